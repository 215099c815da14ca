"""Scores rows and computes metrics: evaluate, predict, retrieval, comparison of runs."""
