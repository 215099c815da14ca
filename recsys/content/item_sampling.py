"""Encodes only a share of a step's items; the memory bank supplies the others (LEMUR).

LEMUR (arXiv 2511.10962) runs its encoder forward for p % and backward for q % of a batch. Here p
and q are shares of the unique items that a rank encodes: items with a forward pass refresh the
bank, those with gradient train the encoder, and the rest are ranked with their vectors in the bank.
The choice is drawn anew in each step, from the seed, the step and the rank alone.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from recsys.config import SamplingSettings
from recsys.data.batch import Batch


def sample_items(batch: Batch, settings: SamplingSettings, draw: tuple[int, int, int]) -> Batch:
    """Return a batch, on the host, that encodes a share of its items and reads the rest.

    At least one item is encoded. `draw` holds seed, step and rank.
    """
    count = len(batch.content_items)
    num_forward = math.ceil(settings.forward * count)
    num_backward = math.ceil(settings.backward * count)
    order = torch.from_numpy(np.random.default_rng(draw).permutation(count))
    place = torch.empty_like(order)  # position of each item in the new order
    place[order] = torch.arange(count)
    chosen = batch.content_items[order]
    changed = replace(
        batch,
        content_items=chosen[:num_forward],
        bank_items=chosen[num_forward:],
        with_gradient=num_backward,
    )
    if batch.exchange is not None:
        return replace(changed, exchange=replace(batch.exchange, rows=place[batch.exchange.rows]))
    return replace(changed, target_index=place[batch.target_index])
