"""Describe a dataset and warn of problems in it before training: `recsys explain-data`."""
