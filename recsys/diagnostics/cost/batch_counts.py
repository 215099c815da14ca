"""Counts the inputs of a step on one rank: the numbers that determine its cost.

Letters: see `recsys.data.jagged_history`; E items to encode, T tokens, S sampled items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from recsys.content.encoders.text_transformer import ITEMS_PER_GROUP, distinct_items
from recsys.data.batch import Batch


@dataclass(frozen=True)
class ModalityCounts:
    """Tokens of the items to encode, in one modality.

    tokens: number of tokens without padding.
    longest: T, the length to which all items are padded.
    grouped, grouped_pairs: number of tokens, and of pairs of tokens of one item, if items of
        similar length are grouped and padded to the longest of their group, equal ones once.
    """

    tokens: float
    longest: float
    grouped: float
    grouped_pairs: float

    @staticmethod
    def of(
        lengths: Tensor,  # [E], tokens of each item
        first: Tensor | None = None,  # an item of each distinct content; None: all differ
    ) -> ModalityCounts:
        """Return the counts for items of these lengths."""
        if not len(lengths):
            return ModalityCounts(0, 0, 0, 0)
        ordered = (lengths if first is None else lengths[first]).sort().values
        groups = [(len(part), max(int(part[-1]), 1)) for part in ordered.split(ITEMS_PER_GROUP)]
        return ModalityCounts(
            tokens=int(lengths.sum()),
            longest=int(ordered[-1]),
            grouped=sum(count * longest for count, longest in groups),
            grouped_pairs=sum(count * longest**2 for count, longest in groups),
        )


@dataclass(frozen=True)
class BatchCounts:
    """Counts of one step, or the mean of several."""

    rows: float  # B
    ids: dict[str, float]  # by feature, of pooled tables, further histories and lists beside any
    unique_ids: dict[str, float]
    looked_up: float  # rows of the item table, for targets and the first history
    unique_looked_up: float  # different ones of these, which get a gradient
    history: float  # N
    unique_history: float  # U
    encoded: float  # E
    with_gradient: float  # encoded items with gradient
    stored: float  # target items read from the bank
    exchanged: float = 0.0  # item vectors that come from the ranks that own them
    modalities: dict[str, ModalityCounts] = field(default_factory=dict)

    @staticmethod
    def of(batch: Batch) -> BatchCounts:
        """Return the counts of a batch in the form that the model gets."""
        encoded = len(batch.content_items)
        features = batch.sequence_features
        last = len(features.keys()) - (batch.negative_items is not None)
        others = features.keys()[2:last]  # after target and history
        by_feature = {name: features[name].values() for name in others}
        own = [name for name in features.keys() if name not in others]  # noqa: SIM118
        looked_up = torch.cat([features[name].values() for name in own])
        trained = encoded if batch.with_gradient is None else min(batch.with_gradient, encoded)
        if batch.sparse_features is not None:
            pooled = batch.sparse_features.to_dict()
            by_feature |= {name: ids.values() for name, ids in pooled.items()}
        return BatchCounts(
            rows=batch.batch_size,
            ids={name: ids.numel() for name, ids in by_feature.items()},
            unique_ids={name: len(ids.unique()) for name, ids in by_feature.items()},
            looked_up=looked_up.numel(),
            unique_looked_up=len(looked_up.unique()),
            history=len(batch.history_index),
            unique_history=len(batch.history_items),
            encoded=encoded,
            with_gradient=trained,
            stored=len(batch.bank_items),
            exchanged=sum(batch.exchange.receive_counts) if batch.exchange is not None else 0,
            modalities={
                name: ModalityCounts.of(part.mask.sum(dim=1), distinct_items(part)[0])
                for name, part in batch.content.items()
            },
        )

    def lookups(self, features: Sequence[str]) -> tuple[float, float]:
        """Return the rows that features look up in their table, and the different ones of these."""
        others = [name for name in features if name in self.ids]
        has_target = len(others) < len(features)
        return (
            sum(self.ids[name] for name in others) + self.looked_up * has_target,
            sum(self.unique_ids[name] for name in others) + self.unique_looked_up * has_target,
        )

    @staticmethod
    def mean(counts: Sequence[BatchCounts]) -> BatchCounts:
        """Return the mean over steps."""
        return _mean(counts)


def _mean(values: Sequence[Any]) -> Any:
    """Return the mean of numbers, of dicts by key, or of dataclasses by field."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _mean([value[key] for value in values]) for key in first}
    if hasattr(first, "__dataclass_fields__"):
        names = [item.name for item in fields(first)]
        return type(first)(**{name: _mean([getattr(v, name) for v in values]) for name in names})
    return fmean(values)


def lengths_like(sample: Tensor, count: int) -> Tensor:  # [S] -> [count]
    """Return `count` lengths with the distribution of a sample, by its quantiles."""
    places = (torch.arange(count) + 0.5) / max(count, 1) * len(sample)
    return sample.sort().values[places.long().clamp(max=len(sample) - 1)]
