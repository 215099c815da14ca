"""Writes MovieLens in the dataset format; the bundled sample lies beside the code."""
