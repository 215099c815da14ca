"""Negatives of a retrieval model's softmax losses: the items, and their probabilities.

A batch gets the log of the probability Q with which its items are drawn as negatives: for in-batch
negatives an item's share of the training rows, for sampled ones that of the draw; zeros if
`log_q_correction` is off. The ids of sampled negatives join the sequence features as one more
feature of the item table, so that their vectors are looked up with those of target and history;
their content comes from the memory bank.

Shapes: B batch, S sampled negatives, I items.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.config import RetrievalSettings
from recsys.data.batch import Batch


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
        self.feature = negatives_feature(settings, target_item)
        self.use_counts(np.ones(num_items, np.int64))

    def use_counts(
        self,
        counts: np.ndarray,  # [I], int64
    ) -> None:
        """Set the number of training rows of each item; all are equal before the first call."""
        self.by_frequency = np.argsort(-counts, kind="stable")
        num_items = len(counts)
        if self.settings.loss == "in_batch_softmax":
            log_q = np.log(counts.clip(min=1) / max(counts.sum(), 1))
        elif self.settings.negative_sampling == "uniform":
            log_q = np.full(num_items, -np.log(num_items))
        else:
            log_q = np.empty(num_items)
            place = np.arange(num_items)
            log_q[self.by_frequency] = np.log(np.log1p(1 / (place + 1)) / np.log(num_items + 1))
        if not self.settings.log_q_correction:
            log_q = np.zeros(num_items)
        self.log_q = torch.from_numpy(log_q.astype(np.float32))

    def __call__(self, batch: Batch, draw: tuple[int, int, int], training: bool) -> Batch:
        """Return a batch, on the host, with log Q and, in training, this draw's negatives."""
        log_q = self.log_q[batch.target_items]
        if self.feature is None:
            return replace(batch, target_log_q=log_q)
        items = torch.from_numpy(self._draw(draw) if training else np.zeros(0, np.int64))
        return replace(
            batch,
            target_log_q=log_q,
            negative_items=items,
            negative_log_q=self.log_q[items],
            sequence_features=_with_feature(batch.sequence_features, self.feature, items),
        )

    def _draw(
        self,
        draw: tuple[int, int, int],
    ) -> np.ndarray:  # [S], int64
        """Sample items with the seed `draw`."""
        random, count = np.random.default_rng(draw), self.settings.num_negatives
        num_items = len(self.by_frequency)
        if self.settings.negative_sampling == "uniform":
            return random.integers(num_items, size=count)
        # Zipf's law over places by frequency, by inverting its distribution.
        places = np.exp(random.random(count) * np.log(num_items + 1)).astype(np.int64) - 1
        return self.by_frequency[places.clip(max=num_items - 1)]


def _with_feature(
    features: KeyedJaggedTensor,
    name: str,
    values: torch.Tensor,  # [S]
) -> KeyedJaggedTensor:
    """Return the features with one more, `name`, of the ids `values`."""
    # Negatives belong to no row; a KeyedJaggedTensor needs every id in one: the first.
    lengths = torch.zeros(features.stride(), dtype=features.lengths().dtype)
    lengths[0] = len(values)
    return KeyedJaggedTensor.from_lengths_sync(
        keys=[*features.keys(), name],
        values=torch.cat([features.values(), values]),
        lengths=torch.cat([features.lengths(), lengths]),
    )
