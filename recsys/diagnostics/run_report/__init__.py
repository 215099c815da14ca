"""Writes one self-contained HTML page on a finished run: metrics, curves, vectors, attention."""
