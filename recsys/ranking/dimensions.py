"""Sizes of a ranking model's inputs, known from the schema and the tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InputDimensions:
    """Widths of what a ranking model is given.

    pooled_dims: D of each pooled feature; id_dim: D of target and history items.
    num_dense: dense features; num_parallel: lists beside the history; num_labels: logits wanted.
    """

    pooled_dims: list[int]
    id_dim: int
    num_dense: int
    num_parallel: int
    num_labels: int
