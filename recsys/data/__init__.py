"""Datasets: the format, its readers and the adapters that write it."""
