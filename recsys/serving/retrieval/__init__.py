"""Retrieval: item vectors of a run, their index, and the items that suit a user best.

Example::

    from recsys.serving.retrieval import Retriever

    retriever = Retriever.load("vectors")
    retriever.retrieve({"user": 7}, ["item 3"], count=100).items  # raw ids, best first
"""

from recsys.serving.retrieval.retriever import Retrieved, Retriever, TwoStage

__all__ = ["Retrieved", "Retriever", "TwoStage"]
