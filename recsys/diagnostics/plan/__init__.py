"""Describe a run before training, on any cluster: `recsys describe`."""
