"""Describes a dataset and warns of problems in it before training: `recsys explain-data`."""
