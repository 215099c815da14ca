"""Deltas between packages: `write` compares two, `apply` makes the second of the first.

A delta is one file, a zip archive without compression: `manifest.json` of the newer package,
`delta.json`, the rows of tables and content vectors that differ (`rows/` has their numbers, `data/`
their bytes), and `files/`, the files that are taken whole.
"""
