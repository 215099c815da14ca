"""Distinct items of a batch and the position of each id among them, without sorting the ids.

Shapes: n ids, U distinct ones.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

# Scanning a table of all items is faster than hashing if it has at most MOST_MARKS entries, and at
# # most MARKS_PER_ID per id.
MOST_MARKS, MARKS_PER_ID = 1 << 22, 256


class UniqueItems:
    """`np.unique(items, return_inverse=True)` of ids in `[0, num_items)`, several times as fast.

    Several threads may call it at once.

    Example::

        UniqueItems(100)(np.array([7, 3, 7]))  # [3, 7], [1, 0, 1]
    """

    def __init__(self, num_items: int) -> None:
        """Keep the bound; tables of marks are made on demand, one per thread."""
        self.num_items = num_items
        self._spare: list[_Marks] = []  # as many as threads have used at the same time

    def __call__(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [n]
        """Return the distinct items [U], ascending, and the place of each id among them [n]."""
        if self.num_items > min(MOST_MARKS, MARKS_PER_ID * len(items)):
            return hashed(items)
        try:
            marks = self._spare.pop()
        except IndexError:
            marks = _Marks(self.num_items)
        found = marks.unique(items)
        self._spare.append(marks)
        return found


class _Marks:
    """A mark and a place for each possible item; no mark is set between calls."""

    def __init__(self, num_items: int) -> None:
        self.is_there = np.zeros(num_items, bool)
        self.place = np.empty(num_items, np.int64)

    def unique(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [n]
        """Return the distinct items [U] and the place of each id among them [n]."""
        self.is_there[items] = True
        distinct = np.flatnonzero(self.is_there)
        self.is_there[distinct] = False
        self.place[distinct] = np.arange(len(distinct))
        return distinct, self.place[items]


def hashed(items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [n] -> [U], [n]
    """Do the same by a hash table: only the distinct items are sorted."""
    encoded = pa.array(items, pa.int64()).dictionary_encode()
    distinct = encoded.dictionary.to_numpy()
    order = distinct.argsort()
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return distinct[order], place[encoded.indices.to_numpy()]
