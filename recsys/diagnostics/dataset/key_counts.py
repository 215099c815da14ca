"""Counts keys in data of any size: exactly up to a limit of distinct keys, else in a sample.

The sample keeps the keys whose hash begins with a number of zero bits, with the count of each, and
is halved whenever it exceeds its limit. A key is sampled with all or none of its occurrences, and
samples of all splits choose the same keys, so that shares, repeats and overlaps can be estimated.

Shapes: N keys or values, R rows.
"""

from __future__ import annotations

import numpy as np

from embeddings.vocabulary.fixed import mix64

LIMIT = 1 << 20  # distinct keys kept: 16 MB; the error of a share of them is about a thousandth


class KeyCounts:
    """Counts of keys that are already hashed (`mix64`).

    Args:
        limit: the most distinct keys to keep.

    Example::

        counts = KeyCounts()
        counts.add(mix64(np.array([7, 8, 7])))
        counts.distinct, counts.repeats  # 2, 1
    """

    def __init__(self, limit: int = LIMIT) -> None:
        """Start without keys."""
        self.limit = limit
        self.halvings = 0  # number of leading zero bits of the keys kept
        self.keys = np.zeros(0, np.uint64)  # ascending
        self.counts = np.zeros(0, np.int64)

    def add(self, keys: np.ndarray) -> None:  # keys: uint64 [N]
        """Count keys."""
        found, times = np.unique(keys[_begins_with_zeros(keys, self.halvings)], return_counts=True)
        both = np.concatenate([self.keys, found])
        self.keys, places = np.unique(both, return_inverse=True)
        counts = np.zeros(len(self.keys), np.int64)
        np.add.at(counts, places, np.concatenate([self.counts, times]))
        self.counts = counts
        while len(self.keys) > self.limit:
            self.halve_to(self.halvings + 1)

    def halve_to(self, halvings: int) -> None:
        """Shrink the sample to this number of halvings, unless it is that small already."""
        if halvings > self.halvings:
            self.halvings = halvings
            kept = _begins_with_zeros(self.keys, halvings)
            self.keys, self.counts = self.keys[kept], self.counts[kept]

    @property
    def is_exact(self) -> bool:
        """Return whether all keys were counted, not a sample."""
        return self.halvings == 0

    @property
    def distinct(self) -> int:
        """Return the number of different keys, estimated if sampled."""
        return len(self.keys) << self.halvings

    @property
    def repeats(self) -> int:
        """Return how many of the added keys had been added before, estimated if sampled."""
        return int(self.counts.sum() - len(self.keys)) << self.halvings

    def share_of_total_in(self, other: KeyCounts) -> float | None:
        """Return the share of added keys that `other` has too; None if nothing is in the sample."""
        halvings = max(self.halvings, other.halvings)
        kept = _begins_with_zeros(self.keys, halvings)
        counts = self.counts[kept]
        if not len(counts):
            return None
        return float(counts[np.isin(self.keys[kept], other.keys)].sum() / counts.sum())


def _begins_with_zeros(keys: np.ndarray, bits: int) -> np.ndarray:  # uint64 [N] -> bool [N]
    if bits == 0:
        return np.ones(len(keys), bool)
    return keys >> np.uint64(64 - bits) == 0


def hash_numbers(values: np.ndarray) -> np.ndarray:  # [N] -> uint64 [N]
    """Hash integers or floats by their bits."""
    if values.dtype.kind == "f":
        values = values.astype(np.float64).view(np.int64)
    return mix64(values.astype(np.int64))


def hash_lists(
    values: np.ndarray,  # [N]
    offsets: np.ndarray,  # int [R + 1]
) -> np.ndarray:  # uint64 [R]
    """Hash the list of each row; the order of its values counts."""
    lengths = np.diff(offsets)
    places = np.arange(len(values)) - np.repeat(offsets[:-1], lengths)
    hashed = mix64(hash_numbers(values) ^ mix64(places))
    # Sums wrap around; their differences are correct nevertheless.
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashed, dtype=np.uint64)])
    return mix64(sums[offsets[1:]] - sums[offsets[:-1]] + lengths.astype(np.uint64))


def join_hashes(
    *parts: np.ndarray,  # uint64 [R] each
) -> np.ndarray:  # uint64 [R]
    """Combine several hashes per row into one; their order counts."""
    joined = np.zeros(len(parts[0]), np.uint64)
    for part in parts:
        joined = mix64(joined ^ part)
    return joined
