"""Describes a run before any training and on any cluster: `recsys describe`."""
