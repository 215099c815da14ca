"""Reads the vectors that the sharded collections looked up, in the order of the configuration.

Shapes: B batch, D dimension, F pooled features, N events of a history in the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recsys.data.batch import Batch
from recsys.ranking.vectors import IDVectors

# Columns that are looked up one vector per id, and the number of table rows of each of their ids.
RowsPerID = Mapping[str, int]


class IDDropout(nn.Module):
    """In training zeroes ID vectors with probability p, so that models learn to rank new items."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, vectors: Tensor) -> Tensor:  # [B, D] -> [B, D]
        if not self.training or not self.p:
            return vectors
        is_kept = torch.rand(len(vectors), 1, device=vectors.device) >= self.p
        return vectors * is_kept.to(vectors.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class IDVectorReader(nn.Module):
    """Lookup results -> `IDVectors`, read by key in the order of the configuration.

    `dropout` is p of `IDDropout` by pooled feature. Vectors of the lists `beside` the history are
    added to its items'. `further` has each extra sequence with the lists beside it.
    """

    def __init__(
        self,
        pooled_features: list[str],
        target: str,
        history: str | None,
        negatives: str | None = None,
        dropout: Mapping[str, float] | None = None,
        beside: RowsPerID | None = None,
        further: Sequence[RowsPerID] = (),
    ) -> None:
        super().__init__()
        dropout = dropout or {}
        self.pooled_dropouts = nn.ModuleList(
            IDDropout(dropout.get(name, 0.0)) for name in pooled_features
        )
        self.pooled_features, self.target, self.history = pooled_features, target, history
        self.negatives, self.beside, self.further = negatives, beside or {}, further

    def forward(self, pooled: Any, sequences: Any, batch: Batch) -> IDVectors:
        """Read a KeyedTensor of F vectors [B, D], and a JaggedTensor per sequence feature.

        If targets have whole histories in common, the vectors [K, D] are those of the histories.
        """
        by_name = pooled.to_dict() if self.pooled_features else {}
        target = sequences[self.target].values()
        history = sequences[self.history].values() if self.history else target[:0]
        if (whole := batch.history.whole) is not None:
            by_name = {name: vectors[whole.rows] for name, vectors in by_name.items()}
        pooled_vectors = [
            dropout(by_name[name])
            for name, dropout in zip(self.pooled_features, self.pooled_dropouts)
        ]
        if self.beside:
            history = batch.history.jagged().gather(history) + _added_up(sequences, self.beside)
        return IDVectors(
            pooled_vectors,
            target,
            history,
            not self.beside,
            sequences[self.negatives].values() if self.negatives else None,
            [_added_up(sequences, columns) for columns in self.further],
        )


def _added_up(sequences: Any, columns: RowsPerID) -> Tensor:  # [N, D]
    vectors = [
        sequences[name].values().unflatten(0, (-1, num_rows)).sum(dim=1)
        if num_rows > 1
        else sequences[name].values()
        for name, num_rows in columns.items()
    ]
    return sum(vectors[1:], vectors[0])
