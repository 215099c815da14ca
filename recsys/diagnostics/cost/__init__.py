"""Counts FLOPs and bytes of a training step by part, and the least time they take."""
