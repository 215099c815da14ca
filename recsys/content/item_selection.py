"""Selects the items that a rank encodes in a step; all functions work on batches on the host.

Shapes: R items that this rank needs, E items that it owns and some rank needs, W ranks.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from recsys.config import SamplingSettings
from recsys.data.batch import Batch, ItemExchange


def assign_to_owners(batch: Batch, group: dist.ProcessGroup) -> Batch:
    """Return a batch that encodes the items which this rank owns and any rank needs. A collective.

    Rank `id mod W` owns an item; `exchange` says to which ranks its vector is sent.
    """
    world_size = dist.get_world_size(group)
    owner = batch.content_items % world_size
    order = owner.argsort(stable=True)  # [R], by owner: vectors arrive in this order
    wanted_counts = owner.bincount(minlength=world_size)
    asked_counts = torch.empty_like(wanted_counts)
    dist.all_to_all_single(asked_counts, wanted_counts, group=group)
    receive_counts, send_counts = wanted_counts.tolist(), asked_counts.tolist()
    requested = torch.empty(sum(send_counts), dtype=torch.int64)
    dist.all_to_all_single(
        requested, batch.content_items[order], send_counts, receive_counts, group=group
    )
    owned, rows = requested.unique(
        return_inverse=True
    )  # [E], and the row in it of each requested item
    arrival = torch.empty_like(order)
    arrival[order] = torch.arange(len(order))
    return replace(
        batch,
        content_items=owned,
        target_index=arrival[batch.target_index],
        history_content_index=arrival[batch.history_content_index],
        exchange=ItemExchange(rows, send_counts=send_counts, receive_counts=receive_counts),
    )


def sample_items(batch: Batch, settings: SamplingSettings, draw: tuple[int, int, int]) -> Batch:
    """Return a batch that encodes a share of its items; the bank has the vectors of the others.

    As in LEMUR (arXiv 2511.10962), but at least one item. `draw` is (seed, step, rank).
    """
    count = len(batch.content_items)
    num_forward = math.ceil(settings.forward * count)
    num_backward = math.ceil(settings.backward * count)
    order = torch.from_numpy(np.random.default_rng(draw).permutation(count))
    place = torch.empty_like(order)  # position of each item in the new order
    place[order] = torch.arange(count)
    shuffled_items = batch.content_items[order]
    changed = replace(
        batch,
        content_items=shuffled_items[:num_forward],
        bank_items=shuffled_items[num_forward:],
        with_gradient=num_backward,
    )
    if batch.exchange is not None:
        return replace(changed, exchange=replace(batch.exchange, rows=place[batch.exchange.rows]))
    return replace(changed, target_index=place[batch.target_index])
