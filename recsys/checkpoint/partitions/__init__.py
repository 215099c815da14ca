"""Folder of a continual run: what is trained, and where models, scores and metrics are kept."""
