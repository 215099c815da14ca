"""Keeps the state of a run: writes, verifies, reshards and exports it."""
