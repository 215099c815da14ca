"""Serving: a run as a package of files, and a scorer that answers requests from it."""

from recsys.serving.scorer import Scorer

__all__ = ["Scorer"]
