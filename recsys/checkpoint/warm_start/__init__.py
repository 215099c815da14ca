"""Warm start: a new run takes over the state of another one, trained on other data.

`request` says what is asked for, `source` opens the checkpoint, `schemas` reconciles the columns,
`row_maps` the rows of tables and items, `plan` decides about every tensor and refuses what does not
fit, `load` moves the values. What differs between the two runs is listed by `differences`.
"""
