"""Checkpoints of a run: written, verified, resharded and exported."""
