"""Splits rows into those of warm, cold and unseen items, by the training rows of each item."""

from __future__ import annotations

import numpy as np

COLD_BELOW = 5  # an item with fewer training rows is cold


def item_parts(item_counts: np.ndarray) -> dict[str, np.ndarray]:
    """Which rows, bool [N], are of items by how many training rows their item has, int [N].

    `unseen` none, `cold` fewer than `COLD_BELOW` (unseen ones too), `warm` the others.
    """
    cold = item_counts < COLD_BELOW
    return {"warm": ~cold, "cold": cold, "unseen": item_counts == 0}
