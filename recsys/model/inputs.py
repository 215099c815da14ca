"""Inputs of the ranking model: ID vectors in the order of the configuration, and scaled numbers.

Shapes: B batch, D dimension, F pooled or dense features, N events of a history in the whole batch,
P lists, W numbers in all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from recsys.data.batch import Batch
from recsys.data.item_frequency import NumberRange
from recsys.ranking.vectors import IDVectors

logger = logging.getLogger(__name__)

# Columns that are looked up one vector per id, with the number of table rows of each id.
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

    `dropout` is p of `IDDropout` by pooled feature. Vectors of lists `parallel` to the history are
    added to its items'. `extra` has each extra sequence with its parallel lists.
    """

    def __init__(
        self,
        pooled_features: list[str],
        target: str,
        history: str | None,
        negatives: str | None = None,
        dropout: Mapping[str, float] | None = None,
        parallel: RowsPerID | None = None,
        extra: Sequence[RowsPerID] = (),
    ) -> None:
        super().__init__()
        rates = [(dropout or {}).get(name, 0.0) for name in pooled_features]
        self.pooled_dropouts = nn.ModuleList(map(IDDropout, rates))
        self.pooled_features, self.target, self.history = pooled_features, target, history
        self.negatives, self.parallel, self.extra = negatives, parallel or {}, extra

    def forward(self, pooled: Any, sequences: Any, batch: Batch) -> IDVectors:
        """Read F vectors, [B, D] or a row per whole history, and JaggedTensors by name."""
        by_name = pooled.to_dict() if self.pooled_features else {}
        target = sequences[self.target].values()
        history = sequences[self.history].values() if self.history else target[:0]
        if (full := batch.history.full) is not None:
            by_name = {name: vectors[full.rows] for name, vectors in by_name.items()}
        dropouts = zip(self.pooled_features, self.pooled_dropouts)
        pooled_vectors = [dropout(by_name[name]) for name, dropout in dropouts]
        if self.parallel:
            history = batch.history.jagged().gather(history) + _column_sum(sequences, self.parallel)
        negatives = sequences[self.negatives].values() if self.negatives else None
        extra = [_column_sum(sequences, columns) for columns in self.extra]
        return IDVectors(pooled_vectors, target, history, not self.parallel, negatives, extra)


def _column_sum(sequences: Any, columns: RowsPerID) -> Tensor:  # [N, D]
    total: Any = None
    for name, num_rows in columns.items():
        vectors = sequences[name].values()
        if num_rows > 1:
            vectors = vectors.unflatten(0, (-1, num_rows)).sum(dim=1)
        total = vectors if total is None else total + vectors
    return total


HORIZON = 10  # number of runs over which warm-started runs average the statistics
LARGEST = 8.0  # standard deviations; larger values are clamped


class InputScaling(nn.Module):
    """Standardises dense columns [F] and lists beside each history [P] that have values beyond 3.

    Mean and variance are those of the training rows.
    """

    mean: Tensor  # [W]
    deviation: Tensor  # [W]
    is_scaled: Tensor  # bool [W]
    fits: Tensor  # []

    def __init__(self, dense: Sequence[str], lists: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.dense, self.lists = list(dense), [list(names) for names in lists]
        self.names = [*self.dense, *(name for names in self.lists for name in names)]
        self.register_buffer("mean", torch.zeros(len(self.names)))
        self.register_buffer("deviation", torch.ones(len(self.names)))
        self.register_buffer("is_scaled", torch.zeros(len(self.names), dtype=torch.bool))
        self.register_buffer("fits", torch.zeros(()))

    def select_dense(self, dense: Sequence[str]) -> InputScaling:
        selected = InputScaling([name for name in dense if name in self.dense], self.lists)
        indices = [self.names.index(name) for name in selected.names]
        for buffer, source in zip(selected.buffers(), self.buffers(), strict=True):
            buffer.copy_(source[indices] if source.dim() else source)
        return selected

    @torch.no_grad()
    def fit(self, numbers: Mapping[str, NumberRange]) -> None:
        """Update mean and deviation by the training rows; a scaled column stays scaled."""
        self.fits += 1
        for index, name in enumerate(self.names):
            rows, was_scaled = numbers[name], bool(self.is_scaled[index])
            if not rows.count or not (rows.is_wide or was_scaled):
                continue
            rate = 1 / min(float(self.fits), HORIZON) if was_scaled else 1.0
            mean, variance = float(self.mean[index]), float(self.deviation[index]) ** 2
            shift = rows.mean - mean
            variance += rate * (rows.variance - variance + (1 - rate) * shift**2)
            self.mean[index] = mean + rate * shift
            self.deviation[index] = math.sqrt(variance) or 1.0
            self.is_scaled[index] = True
            logger.info("standardized: '%s', %s in the training rows", name, rows)

    def forward(self, batch: Batch) -> Batch:
        """Return the batch with standardised numbers; `recorded_values` stay as they are."""
        start, scaled, histories = 0, [], batch.history.extras
        lists = [batch.history.values, *(history.values for history in histories)]
        names = [self.dense, *(self.lists or [[]])]
        for numbers, columns in zip([batch.dense_features, *lists], names, strict=True):
            span = slice(start, start + len(columns))
            scaled.append(self._scaled(numbers, span) if columns else numbers)
            start = span.stop
        dense, values, *extra_values = scaled
        history = replace(
            batch.history,
            values=values,
            unscaled_values=batch.history.values,
            extras=[replace(events, values=rows) for events, rows in zip(histories, extra_values)],
        )
        return replace(batch, dense_features=dense, history=history)

    def _scaled(self, numbers: Tensor, span: slice) -> Tensor:
        standard = (numbers - self.mean[span]) / self.deviation[span]
        standard = standard.clamp(-LARGEST, LARGEST)
        return torch.where(self.is_scaled[span], standard, numbers)
