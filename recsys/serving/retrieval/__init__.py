"""Retrieval: item vectors of a run, their index, and the items that suit a user best."""

from recsys.serving.retrieval.retriever import Retrieved, Retriever

__all__ = ["Retrieved", "Retriever"]
