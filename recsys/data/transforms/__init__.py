"""Transforms of columns that `schema.yaml` declares: steps, their fit to train/, their use."""
