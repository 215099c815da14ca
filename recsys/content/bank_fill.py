"""Encodes items outside of training steps, to fill the memory bank or to return their vectors.

Shapes: U items, E width of a vector as the bank keeps it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from recsys.content.branch import ContentBranch
from recsys.data.items.content_store import ContentStore
from recsys.distributed.ranks import Ranks

ITEMS_PER_CALL = 256


@torch.no_grad()
def encode_into_bank(
    content: ContentBranch,
    store: ContentStore,
    ranks: Ranks,
    between: Callable[[], None] | None = None,
    ids: np.ndarray | None = None,  # [U]
    find: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Encode items, without dropout, and write their vectors to the bank. A collective.

    Args:
        content: the content branch, which must have a bank.
        store: content of the items.
        ranks: the ranks; each encodes its share.
        between: called, on every rank, before each write.
        ids: the items, the same on every rank; default all that the files have.
        find: a collective that returns the rows of items in the bank, -1 for those without one,
            which are left out; default: items are rows.
    """
    assert content.bank is not None
    was_training = content.training
    content.eval()
    items = np.sort(store.items.ids) if ids is None else ids
    share = np.array_split(items, ranks.world_size)[ranks.rank]
    # All ranks make the same number of calls, as each is a collective.
    longest = -(-len(items) // ranks.world_size)
    for call in np.array_split(share, -(-longest // ITEMS_PER_CALL)):
        rows = torch.from_numpy(call)
        if find is not None:
            rows = find(rows)
            call, rows = call[rows.numpy() >= 0], rows[rows >= 0]
        vectors = torch.zeros(0, content.bank.dim, device=ranks.device)
        if len(call):
            inputs = {name: part.to(ranks.device) for name, part in store.gather(call).items()}
            vectors = content.encode(inputs)
        if between is not None:
            between()
        content.bank.update(rows.to(ranks.device), vectors, content.step)
    content.train(was_training)


@torch.no_grad()
def item_vectors(
    content: ContentBranch,
    store: ContentStore,
    ranks: Ranks,
    ids: np.ndarray,  # [U]
) -> Tensor:  # [U, E], on the host
    """Return the vectors of this rank's items, from the bank if there is one, else encoded.

    A collective: every rank asks for items of its own, or for none.
    """
    if content.bank is not None:
        return content.bank.lookup(torch.from_numpy(ids).to(ranks.device))[0].cpu()
    was_training = content.training
    content.eval()
    vectors = [torch.zeros(0, content.vector_dim)]
    for start in range(0, len(ids), ITEMS_PER_CALL):
        inputs = store.gather(ids[start : start + ITEMS_PER_CALL])
        on_device = {name: part.to(ranks.device) for name, part in inputs.items()}
        vectors.append(content.encode(on_device).float().cpu())
    content.train(was_training)
    return torch.cat(vectors)
