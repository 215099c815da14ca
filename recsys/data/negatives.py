"""Negatives for a retrieval model's softmax losses: items, and their sampling probabilities Q.

Only items with training rows are negatives. Without `log_q_correction`, log Q is 0.
Shapes: B batch, S sampled negatives, N any items.
"""

from dataclasses import replace

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from recsys.config import RetrievalSettings
from recsys.data.batch import Batch, Negatives
from recsys.data.item_frequency import ItemCounts


def negatives_feature(settings: RetrievalSettings | None, target_item: str) -> str | None:
    """Return the feature that looks up negatives; None if the batch's items are the negatives."""
    is_drawn = settings is not None and settings.loss in ("sampled_softmax", "full_softmax")
    return f"negatives of {target_item}" if is_drawn else None


class NegativeSampler:
    """Adds negatives and their log-probabilities to batches, for `RetrievalLoss`."""

    def __init__(self, settings: RetrievalSettings, num_items: int, target_item: str) -> None:
        self.settings, self.num_items = settings, num_items
        self.feature = negatives_feature(settings, target_item)
        self.counts = ItemCounts.sum_of([])  # training rows; while empty, all items are drawn

    def log_q(self, items: torch.Tensor) -> torch.Tensor:  # int64 [N] -> [N]
        """Return log Q of each item; an item without training rows counts as one with one row."""
        if not self.settings.log_q_correction or self.settings.loss == "full_softmax":
            return torch.zeros(len(items))
        ids, total = items.numpy(), self.counts.counts.sum()
        if self.settings.loss == "in_batch_softmax" and total:
            log_q = np.log(self.counts.of(ids).clip(min=1) / total)
        else:
            log_q = np.full(len(ids), -np.log(self._num_drawn))
        return torch.from_numpy(log_q.astype(np.float32))

    @property
    def _num_drawn(self) -> int:
        return len(self.counts.items) or self.num_items

    def __call__(self, batch: Batch, draw: tuple[int, int, int], training: bool) -> Batch:
        """Return a batch, on the host, with log Q and, in training, negatives seeded by `draw`."""
        log_q = self.log_q(batch.target.frequency_keys)
        batch = replace(batch, target=replace(batch.target, log_q=log_q))
        if self.feature is None:
            return batch
        items = torch.from_numpy(self._draw(draw) if training else np.zeros(0, np.int64))
        return replace(
            batch,
            negatives=Negatives(items, self.log_q(items)),
            sequence_features=with_ids(batch.sequence_features, self.feature, items),
        )

    def _draw(self, draw: tuple[int, int, int]) -> np.ndarray:  # [S], int64
        if self.settings.loss == "full_softmax":
            indices = np.arange(self._num_drawn)
        else:
            random, count = np.random.default_rng(draw), self.settings.num_negatives
            indices = random.integers(self._num_drawn, size=count)
        return self.counts.items[indices] if len(self.counts.items) else indices


def with_ids(
    features: KeyedJaggedTensor, name: str, ids: torch.Tensor
) -> KeyedJaggedTensor:  # ids [S]
    """Return the features with these ids for `name`, added or replaced; they belong to no row."""
    # A KeyedJaggedTensor needs a row for every id: the first.
    lengths = torch.zeros(features.stride(), dtype=features.lengths().dtype)
    lengths[0] = len(ids)
    tensors = {**features.to_dict(compute_offsets=False), name: JaggedTensor(ids, lengths=lengths)}
    return KeyedJaggedTensor.from_jt_dict(tensors)
