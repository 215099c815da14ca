"""Datasets: their format, readers, and adapters that convert logs to the format."""
