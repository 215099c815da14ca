"""Describes a dataset, and what to change in it, before any training: `recsys explain-data`."""
