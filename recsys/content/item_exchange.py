"""Encodes each item of all ranks' batches on one rank only.

The owner of an item (rank = id modulo the number of ranks) receives before the step which ranks
need it, encodes it once, and sends its vector to them by a differentiable all_to_all. The backward
returns the gradients of these ranks to the owner and adds them up. As DistributedDataParallel
averages over ranks, losses and gradients equal those of each rank encoding its own items, to
rounding.

Shapes: R items that this rank needs, E items that it owns and some rank needs, W ranks,
D width of a vector.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_to_all_single

if TYPE_CHECKING:  # torchrec takes seconds to import, and encoding items does not need it
    from recsys.data.batch import Batch, ItemExchange


def assign_to_owners(batch: Batch, group: dist.ProcessGroup) -> Batch:
    """Return a batch, on the host, that encodes the items owned by this rank. A collective.

    Its `content_items` are the unique items that this rank owns and that any rank needs; its
    `exchange` describes how their vectors reach those ranks.
    """
    from recsys.data.batch import ItemExchange

    world_size = dist.get_world_size(group)
    owner = batch.content_items % world_size
    order = owner.argsort(stable=True)  # [R], by owner: vectors arrive in this order
    wanted_counts = owner.bincount(minlength=world_size)
    asked_counts = torch.empty_like(wanted_counts)
    dist.all_to_all_single(asked_counts, wanted_counts, group=group)
    wanted_from, asked_by = wanted_counts.tolist(), asked_counts.tolist()
    asked = torch.empty(sum(asked_by), dtype=torch.int64)
    dist.all_to_all_single(asked, batch.content_items[order], asked_by, wanted_from, group=group)
    owned, rows = asked.unique(return_inverse=True)  # [E], and the row in it of each requested item
    arrival = torch.empty_like(order)
    arrival[order] = torch.arange(len(order))
    return replace(
        batch,
        content_items=owned,
        target_index=arrival[batch.target_index],
        history_content_index=arrival[batch.history_content_index],
        exchange=ItemExchange(rows, send_counts=asked_by, receive_counts=wanted_from),
    )


def exchange_vectors(
    vectors: Tensor, exchange: ItemExchange, group: dist.ProcessGroup
) -> Tensor:  # [E, D] -> [R, D]
    """Return the vectors that this rank needs, from their owners, with gradient. A collective."""
    sent = vectors.index_select(0, exchange.rows)
    received = sent.new_empty(sum(exchange.receive_counts), vectors.shape[1])
    return all_to_all_single(
        received, sent, exchange.receive_counts, exchange.send_counts, group=group
    )
