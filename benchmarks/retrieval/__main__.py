"""Runs `python -m benchmarks.retrieval`."""

import sys

from jsonargparse import auto_cli

from benchmarks.retrieval.indexes import retrieval

if __name__ == "__main__":
    sys.exit(0 if auto_cli(retrieval, as_positional=False) else 1)
