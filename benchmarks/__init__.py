"""Benchmarks: what the product reaches, each a command that rewrites its file under results/."""
