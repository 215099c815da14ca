"""Warm start: a new run takes over the state of another one, trained on other data.

`source` has the request and opens the checkpoint, `comparison` reconciles columns and settings,
`rows` maps the rows of tables and moves them, `plan` decides about every tensor.
"""
