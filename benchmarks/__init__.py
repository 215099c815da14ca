"""Benchmarks of the product; each is a command that rewrites its file under results/."""
