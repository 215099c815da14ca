"""Splits rows into those of warm, cold and unseen items, by the training rows of each item."""

from __future__ import annotations

import numpy as np

COLD_BELOW = 5  # an item with fewer training rows is cold
PARTS = ("all", "warm", "cold", "unseen")


def item_parts(item_counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns which rows, bool [N], are in each of `PARTS`, by their item's training rows, int [N].

    `unseen` none, `cold` fewer than `COLD_BELOW` (unseen ones too), `warm` the others, `all` every.
    """
    cold = item_counts < COLD_BELOW
    every = np.ones(len(item_counts), dtype=bool)
    return {"all": every, "warm": ~cold, "cold": cold, "unseen": item_counts == 0}
