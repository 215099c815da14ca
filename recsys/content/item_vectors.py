"""Content vectors of items outside of training steps: for the memory bank, for scoring, to return.

Shapes: U items, N items with a row in the files, S cached vectors, V width of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from embeddings.host import is_host
from recsys.content.branch import ContentBranch
from recsys.data.items.content_store import ContentStore
from recsys.data.items.kind import ContentInput
from recsys.distributed.ranks import Ranks

if TYPE_CHECKING:
    from recsys.data.batch import Batch


MAX_CACHE_BYTES = 2**28
ITEMS_PER_CALL, SCORED_ITEMS_PER_CALL = 256, 1024


def items_per_fill(device: torch.device) -> int:
    """Return the items of a call that fills the bank: on a GPU so many that it is busy."""
    return ITEMS_PER_CALL if is_host(device) else SCORED_ITEMS_PER_CALL


class ItemVectorCache:
    """Gives batches the content vectors of their items; caches `max_bytes` of constant vectors."""

    def __init__(
        self,
        branch: ContentBranch,
        store: ContentStore,
        device: torch.device,
        max_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        self.branch, self.store, self.device, self.max_bytes = branch, store, device, max_bytes
        # By row of the files, the place of an item's vector, -1 without one. The last entry stands
        # for all items without a row: they have the same vector, that of no content.
        self._places = np.full(store.items.num_rows + 1, -1)
        modalities = len(branch.encoders) if branch.keeps_modalities else 0
        self._cached = torch.zeros(0, branch.dim * (1 + modalities), device=device)  # [S, V]
        self._count = 0  # rows of it that are used

    def __call__(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            vectors = self.vectors(batch.content.items)
            yield replace(batch, content=replace(batch.content, inputs={}, vectors=vectors))

    @torch.no_grad()
    def vectors(self, items: Tensor) -> Tensor:  # int64 [U], on the host -> [U, V], on the device
        ids = items.numpy()
        rows = self.store.rows_of(ids)
        new = np.flatnonzero(self._places[rows] < 0)
        parts = [self._cached[:0]]
        for start in range(0, len(new), SCORED_ITEMS_PER_CALL):
            inputs = self.store.gather(ids[new[start : start + SCORED_ITEMS_PER_CALL]])
            inputs = {name: part.to(self.device) for name, part in inputs.items()}
            parts.append(self.branch.encode(inputs))
        encoded = torch.cat(parts)
        self._add(rows[new], encoded)
        places = torch.from_numpy(self._places[rows]).to(self.device)
        if not (self._places[rows] < 0).any():
            return self._cached.index_select(0, places)
        vectors = self._cached.index_select(0, places.clamp(min=0))
        vectors[torch.from_numpy(new).to(self.device)] = encoded
        return vectors

    def _add(self, rows: np.ndarray, vectors: Tensor) -> None:  # [U], [U, V]
        capacity = max(1, self.max_bytes // (vectors.shape[1] * vectors.element_size()))
        num_added = min(len(rows), capacity - self._count)
        end = self._count + num_added
        if end > len(self._cached):
            size = min(capacity, max(2 * end, SCORED_ITEMS_PER_CALL))
            larger = self._cached.new_zeros(size, self._cached.shape[1])
            larger[: self._count] = self._cached[: self._count]
            self._cached = larger
        self._cached[self._count : end] = vectors[:num_added]
        self._places[rows[:num_added]] = np.arange(self._count, end)
        self._count = end


@torch.no_grad()
def encode_into_bank(
    content: ContentBranch,
    store: ContentStore,
    ranks: Ranks,
    before_write: Callable[[], None] | None = None,
    ids: np.ndarray | None = None,  # [U], the same on every rank; default: all items of the files
    find: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Encode items, without dropout, and write their vectors to the bank. A collective.

    Each rank encodes its share, and calls `before_write` before each write. `find` is a collective
    that returns the items' rows in the bank, -1 for items to leave out; default: ids are rows.
    """
    assert content.bank is not None
    was_training = content.training
    content.eval()
    items = np.sort(store.items.ids) if ids is None else ids
    share = np.array_split(items, ranks.world_size)[ranks.rank]
    # All ranks make the same number of calls, as each is a collective.
    longest = -(-len(items) // ranks.world_size)
    for call in np.array_split(share, -(-longest // items_per_fill(ranks.device))):
        rows = torch.from_numpy(call)
        if find is not None:
            rows = find(rows)
            call, rows = call[rows.numpy() >= 0], rows[rows >= 0]
        vectors = torch.zeros(0, content.bank.dim, device=ranks.device)
        outputs: dict[str, ContentInput] = {}  # of trained encoders, if these are stored
        if len(call):
            inputs = {name: part.to(ranks.device) for name, part in store.gather(call).items()}
            outputs = {} if content.outputs is None else content.outputs.encode(inputs)
            vectors = content.encode(inputs, outputs)
        if before_write is not None:
            before_write()
        rows = rows.to(ranks.device)
        content.bank.update(rows, vectors, content.step)
        if content.outputs is not None:
            content.outputs.write(rows, outputs, content.step)
    content.train(was_training)
