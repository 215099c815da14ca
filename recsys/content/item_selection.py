"""Selects the items that a rank encodes in a step; all functions work on the host.

Shapes: R items that this rank needs, E items that it owns and some rank needs, W ranks.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from recsys.config import SamplingSettings
from recsys.data.batch import BatchContent, ItemExchange


def assign_to_owners(content: BatchContent, group: dist.ProcessGroup) -> BatchContent:
    """Return the content of items that this rank owns and any rank needs. A collective.

    Rank `id mod W` owns an item; `exchange` says to which ranks its vector is sent.
    """
    world_size = dist.get_world_size(group)
    owner = content.items % world_size
    order = owner.argsort(stable=True)  # [R], by owner: vectors arrive in this order
    wanted_counts = owner.bincount(minlength=world_size)
    asked_counts = torch.empty_like(wanted_counts)
    dist.all_to_all_single(asked_counts, wanted_counts, group=group)
    receive_counts, send_counts = wanted_counts.tolist(), asked_counts.tolist()
    requested = torch.empty(sum(send_counts), dtype=torch.int64)
    dist.all_to_all_single(
        requested, content.items[order], send_counts, receive_counts, group=group
    )
    owned, rows = requested.unique(
        return_inverse=True
    )  # [E], and the row in it of each requested item
    arrival = torch.empty_like(order)
    arrival[order] = torch.arange(len(order))
    return replace(
        content,
        items=owned,
        target_index=arrival[content.target_index],
        history_index=arrival[content.history_index],
        exchange=ItemExchange(rows, send_counts=send_counts, receive_counts=receive_counts),
    )


def sample_items(
    content: BatchContent, settings: SamplingSettings, draw: tuple[int, int, int]
) -> BatchContent:
    """Return the content of a share of its items; the bank has the vectors of the others.

    As in LEMUR (arXiv 2511.10962), but at least one item. `draw` is (seed, step, rank).
    """
    count = len(content.items)
    num_forward = math.ceil(settings.forward * count)
    num_backward = math.ceil(settings.backward * count)
    order = torch.from_numpy(np.random.default_rng(draw).permutation(count))
    place = torch.empty_like(order)  # position of each item in the new order
    place[order] = torch.arange(count)
    shuffled_items = content.items[order]
    sampled = replace(
        content,
        items=shuffled_items[:num_forward],
        bank_items=shuffled_items[num_forward:],
        with_gradient=num_backward,
    )
    if content.exchange is not None:
        exchange = replace(content.exchange, rows=place[content.exchange.rows])
        return replace(sampled, exchange=exchange)
    return replace(sampled, target_index=place[content.target_index])
