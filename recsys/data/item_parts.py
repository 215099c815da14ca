"""Counts the training rows of each item, and splits rows by it: warm, cold and unseen items.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from recsys.data.parquet.values import ROW_POSITION
from recsys.data.row_source import RowSource

COLD_BELOW = 5  # an item with fewer training rows is cold
PARTS = ("all", "warm", "cold", "unseen")


def item_parts(
    item_counts: np.ndarray,  # [N], int
) -> dict[str, np.ndarray]:  # [N], bool each
    """Return the rows of each of `PARTS` by the number of training rows of their item.

    `unseen`: none; `cold`: fewer than `COLD_BELOW`, unseen ones included; `warm`: all others;
    `all`: every row.
    """
    cold = item_counts < COLD_BELOW
    every = np.ones(len(item_counts), dtype=bool)
    return {"all": every, "warm": ~cold, "cold": cold, "unseen": item_counts == 0}


def count_items(
    rows: RowSource,
    rank: int,
    world_size: int,
    also: Callable[[pa.Table], None] | None = None,
) -> np.ndarray:  # [num_items], int64
    """Return how often each item is the target in a rank's share.

    All columns are read, so that an unusable value ends the job before its first step. `also` is
    called with each chunk of rows.
    """
    counts = np.zeros(rows.schema.num_items, dtype=np.int64)
    target = rows.schema.target_item
    for table in rows.read(*rows.share(rank, world_size)):
        if also is not None:
            also(table)
        known = table[target].to_numpy()[table[ROW_POSITION].to_numpy() >= 0]
        # bincount would allocate another array as long as the whole table.
        items, times = np.unique(known, return_counts=True)
        counts[items] += times
    return counts
