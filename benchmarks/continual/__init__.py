"""Continual training: its quality beside other ways on one log, and the time of a partition."""
