"""Serving: a run as a package of files, and a scorer that answers requests from it.

Example::

    from recsys.serving import Scorer

    scorer = Scorer.load("package")
    scorer.score({"user": 7}, [3, 12], candidates=[41, 42])  # [2, number of labels]
"""

from recsys.serving.scorer import Scorer

__all__ = ["Scorer"]
