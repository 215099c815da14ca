"""Ranks of a job: joins them, keeps them in step, and ends them together.

This package knows TorchRec's pipeline and process groups, and nothing of datasets or models.
Shapes in its docstrings: N rows of one rank, D dimension.
"""
