"""Counts keys in data of any size: exactly while they are few, else in a sample of keys.

A sample by hash keeps the keys whose hash begins with enough zeros, with the count of each, and
halves itself whenever it grows beyond its limit. Each key is in it or not as a whole, and the same
keys are in the samples of all splits, so shares, repeats and overlaps can be read off it.

Shapes: N keys.
"""

from __future__ import annotations

import numpy as np

from embeddings.vocabulary.fixed import mix64

LIMIT = 1 << 20  # distinct keys kept: 16 MB; the error of a share of them is about a thousandth


class KeyCounts:
    """Counts of keys that are already hashed (`mix64`).

    Args:
        limit: distinct keys that are kept at most.

    Example::

        counts = KeyCounts()
        counts.add(mix64(np.array([7, 8, 7])))
        counts.distinct, counts.repeats  # 2, 1
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.halvings = 0  # keys whose first so many bits are zero are kept
        self.keys = np.zeros(0, np.uint64)  # ascending
        self.counts = np.zeros(0, np.int64)
        self.total = 0  # keys added

    def add(self, keys: np.ndarray) -> None:
        """Count keys, uint64 [N]."""
        self.total += len(keys)
        found, times = np.unique(keys[_begins_with_zeros(keys, self.halvings)], return_counts=True)
        both = np.concatenate([self.keys, found])
        self.keys, places = np.unique(both, return_inverse=True)
        counts = np.zeros(len(self.keys), np.int64)
        np.add.at(counts, places, np.concatenate([self.counts, times]))
        self.counts = counts
        while len(self.keys) > self.limit:
            self.halve_to(self.halvings + 1)

    def halve_to(self, halvings: int) -> None:
        """Keep a smaller sample, if it is smaller."""
        if halvings > self.halvings:
            self.halvings = halvings
            kept = _begins_with_zeros(self.keys, halvings)
            self.keys, self.counts = self.keys[kept], self.counts[kept]

    @property
    def is_exact(self) -> bool:
        return self.halvings == 0

    @property
    def distinct(self) -> int:
        """Return the number of different keys."""
        return len(self.keys) << self.halvings

    @property
    def repeats(self) -> int:
        """Return how many of the keys had come before."""
        return int(self.counts.sum() - len(self.keys)) << self.halvings

    def share_of_total_in(self, other: KeyCounts) -> float | None:
        """Return the share of all that was counted whose key the other count has too."""
        halvings = max(self.halvings, other.halvings)
        kept = _begins_with_zeros(self.keys, halvings)
        counts = self.counts[kept]
        if not len(counts):
            return None
        return float(counts[np.isin(self.keys[kept], other.keys)].sum() / counts.sum())


def _begins_with_zeros(keys: np.ndarray, bits: int) -> np.ndarray:
    if bits == 0:
        return np.ones(len(keys), bool)
    return keys >> np.uint64(64 - bits) == 0


def hash_numbers(values: np.ndarray) -> np.ndarray:
    """Return hashes, uint64 [N], of integers or floats by their bits."""
    if values.dtype.kind == "f":
        values = values.astype(np.float64).view(np.int64)
    return mix64(values.astype(np.int64))


def hash_lists(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return hashes, uint64 [R], of the lists between R + 1 offsets; order counts."""
    lengths = np.diff(offsets)
    places = np.arange(len(values)) - np.repeat(offsets[:-1], lengths)
    hashed = mix64(hash_numbers(values) ^ mix64(places))
    # Sums that wrap round; differences of them are right all the same.
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashed, dtype=np.uint64)])
    return mix64(sums[offsets[1:]] - sums[offsets[:-1]] + lengths.astype(np.uint64))


def join_hashes(*parts: np.ndarray) -> np.ndarray:
    """Return one hash of several per row, in their order."""
    joined = np.zeros(len(parts[0]), np.uint64)
    for part in parts:
        joined = mix64(joined ^ part)
    return joined
