"""Counts the training rows of each item, and splits rows by it: warm, cold and unseen items."""

from __future__ import annotations

import numpy as np

from recsys.data.parquet.values import ROW_POSITION
from recsys.data.row_source import RowSource

COLD_BELOW = 5  # an item with fewer training rows is cold
PARTS = ("all", "warm", "cold", "unseen")


def item_parts(item_counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return which rows, bool [N], are in each of `PARTS`, by their item's training rows, int [N].

    `unseen` none, `cold` fewer than `COLD_BELOW` (unseen ones too), `warm` the others, `all` every.
    """
    cold = item_counts < COLD_BELOW
    every = np.ones(len(item_counts), dtype=bool)
    return {"all": every, "warm": ~cold, "cold": cold, "unseen": item_counts == 0}


def count_items(rows: RowSource, rank: int, world_size: int) -> np.ndarray:
    """Return how often each item is the target in a rank's share: int64 [num_items].

    All columns are read, so that a value that cannot be used ends a job before its first step.
    """
    counts = np.zeros(rows.schema.num_items, dtype=np.int64)
    target = rows.schema.target_item
    for table in rows.read(*rows.share(rank, world_size)):
        known = table[target].to_numpy()[table[ROW_POSITION].to_numpy() >= 0]
        # Not bincount, which would make another array of the whole table's length.
        items, times = np.unique(known, return_counts=True)
        counts[items] += times
    return counts
