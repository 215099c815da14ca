"""Warm start: a new run takes over the state of another one, trained on other data."""
