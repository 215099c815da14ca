"""Latency of a package and of its server: `python -m benchmarks.serving --package PACKAGE`."""
