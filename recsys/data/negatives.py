"""Negatives of a retrieval model's softmax losses: the items, and their probabilities.

A batch gets the log of the probability Q with which its items are drawn as negatives: for in-batch
negatives an item's share of the training rows, for sampled ones that of the draw; zeros if
`log_q_correction` is off. The ids of sampled negatives join the sequence features as one more
feature of the item table, so that their vectors are looked up with those of target and history;
their content comes from the memory bank.

Only frequencies of items with training rows are kept, so memory does not grow with the table.

Shapes: B batch, S sampled negatives, U items with training rows, N any items.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.config import RetrievalSettings
from recsys.data.batch import Batch
from recsys.data.item_parts import ItemCounts


def negatives_feature(settings: RetrievalSettings | None, target_item: str) -> str | None:
    """Return the feature that looks up sampled negatives; None if none are sampled."""
    is_sampled = settings is not None and settings.loss == "sampled_softmax"
    return f"negatives of {target_item}" if is_sampled else None


class NegativeSampler:
    """Adds negatives and their log-probabilities to batches, for `RetrievalLoss`.

    Args:
        settings: `loss`, `num_negatives`, `negative_sampling`.
        num_items: ids run from 0 to num_items - 1.
        target_item: column of the ranked item.

    Example::

        sampler = NegativeSampler(settings, num_items=100, target_item="item")
        sampler.use_counts(counts)
        sampler(batch, (seed, step, rank), training=True).negative_items  # [S]
    """

    def __init__(self, settings: RetrievalSettings, num_items: int, target_item: str) -> None:
        """Start with equal counts for all items; see `use_counts`."""
        self.settings = settings
        self.num_items = num_items
        self.feature = negatives_feature(settings, target_item)
        self.use_counts(ItemCounts.sum_of([]))

    def use_counts(self, counts: ItemCounts) -> None:
        """Set the number of training rows of each item; all are equal before the first call."""
        self._counts, num_counted = counts, len(counts.items)
        by_frequency = np.argsort(-counts.counts, kind="stable")
        self._most_frequent = counts.items[by_frequency]  # [U]; all others follow by id
        self._places = np.empty(num_counted, np.int64)  # [U]
        self._places[by_frequency] = np.arange(num_counted)
        self._others_below = counts.items - np.arange(num_counted)  # [U], items that have no rows

    def log_q(self, items: torch.Tensor) -> torch.Tensor:  # int64 [N] -> [N]
        """Return the log of the probability that each item is drawn."""
        if not self.settings.log_q_correction:
            return torch.zeros(len(items))
        ids, total = items.numpy(), self._counts.counts.sum()
        if self.settings.loss == "in_batch_softmax" and total:
            log_q = np.log(self._counts.of(ids).clip(min=1) / total)
        elif self.settings.loss == "in_batch_softmax" or self._is_uniform:
            log_q = np.full(len(ids), -np.log(self.num_items))
        else:
            log_q = np.log(np.log1p(1 / (self._place_of(ids) + 1)) / np.log(self.num_items + 1))
        return torch.from_numpy(log_q.astype(np.float32))

    @property
    def _is_uniform(self) -> bool:
        return self.settings.negative_sampling == "uniform"

    def _place_of(self, items: np.ndarray) -> np.ndarray:  # int64 [N] -> int64 [N]
        """Return the rank of each item by frequency; equally frequent items are ordered by id."""
        counted, num_counted = self._counts.items, len(self._places)
        below = np.searchsorted(counted, items)
        place = num_counted + items - below
        is_counted = (below < num_counted) & (np.append(counted, -1)[below] == items)
        place[is_counted] = self._places[below[is_counted]]
        return place

    def _item_at(self, place: np.ndarray) -> np.ndarray:  # int64 [N] -> int64 [N]
        """Return the item at each rank by frequency."""
        other = place - len(self._places)
        items = other + np.searchsorted(self._others_below, other, side="right")
        items[other < 0] = self._most_frequent[place[other < 0]]
        return items

    def __call__(self, batch: Batch, draw: tuple[int, int, int], training: bool) -> Batch:
        """Return a batch, on the host, with log Q and, in training, this draw's negatives."""
        log_q = self.log_q(batch.counted_items)
        if self.feature is None:
            return replace(batch, target_log_q=log_q)
        items = torch.from_numpy(self._draw(draw) if training else np.zeros(0, np.int64))
        return replace(
            batch,
            target_log_q=log_q,
            negative_items=items,
            negative_log_q=self.log_q(items),
            sequence_features=_with_feature(batch.sequence_features, self.feature, items),
        )

    def _draw(self, draw: tuple[int, int, int]) -> np.ndarray:  # [S], int64
        """Sample items with the seed `draw`."""
        random, count = np.random.default_rng(draw), self.settings.num_negatives
        if self._is_uniform:
            return random.integers(self.num_items, size=count)
        # Zipf's law over places by frequency, by inverting its distribution.
        places = np.exp(random.random(count) * np.log(self.num_items + 1))
        return self._item_at(places.astype(np.int64).clip(max=self.num_items) - 1)


def _with_feature(
    features: KeyedJaggedTensor, name: str, values: torch.Tensor
) -> KeyedJaggedTensor:  # values [S]
    """Return the features with one more, `name`, of the ids `values`."""
    # Negatives belong to no row; a KeyedJaggedTensor needs every id in one: the first.
    lengths = torch.zeros(features.stride(), dtype=features.lengths().dtype)
    lengths[0] = len(values)
    return KeyedJaggedTensor.from_lengths_sync(
        keys=[*features.keys(), name],
        values=torch.cat([features.values(), values]),
        lengths=torch.cat([features.lengths(), lengths]),
    )
