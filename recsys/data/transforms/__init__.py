"""Transforms of columns that `schema.yaml` declares: steps, their fit on train/, their use."""
