"""Score rows and compute metrics: evaluate, predict, retrieval, comparison of runs."""
