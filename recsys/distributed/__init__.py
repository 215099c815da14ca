"""Ranks of a job: join them, keep them in step, and end them together.

This package depends on TorchRec's pipeline and process groups, not on datasets or models.
Shapes in its docstrings: N rows of one rank, D dimension.
"""
