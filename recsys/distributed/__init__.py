"""Runs a job on several ranks: joins them, keeps them in step, and ends them together.

This room knows TorchRec's pipeline and process groups, and nothing of datasets or models.
"""
