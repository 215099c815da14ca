"""Content vectors of the items that a pass without training meets: each item is encoded once.

While the model does not change, an item has the same vector in every batch. `ScoredItems` encodes
an item at its first occurrence and keeps its vector, up to a bound of memory; items beyond it are
encoded in each batch, as in training. The slow way, every item in every batch, is the branch's own
(`ContentBranch.forward`); tests compare both.

Shapes: E items of a batch, N items with a row in the files, S vectors that are kept,
V width of a vector as the bank keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recsys.content.branch import ContentBranch
from recsys.data.items.content_store import ContentStore

if TYPE_CHECKING:  # torchrec takes seconds to import, and encoding items does not need it
    from recsys.data.batch import Batch

MOST_BYTES = 2**28  # of the vectors that are kept
ITEMS_PER_CALL = 1024


class ScoredItems:
    """Gives batches the content vectors of their items.

    Args:
        branch: the content branch, whose weights do not change meanwhile.
        store: content of the items.
        device: the branch's.
        most_bytes: largest size of the vectors that are kept.

    Example::

        known = ScoredItems(em3.content, store, device)
        batches = known(batches)  # the branch encodes none of their items
    """

    def __init__(
        self,
        branch: ContentBranch,
        store: ContentStore,
        device: torch.device,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """Begin without a vector."""
        self.branch, self.store, self.device, self.most_bytes = branch, store, device, most_bytes
        # By row of the files, the place of an item's vector, -1 without one. The last is that of
        # all items without a row, which have the same vector: that of no content.
        self._places = np.full(store.items.num_rows + 1, -1)
        modalities = len(branch.encoders) if branch.keeps_modalities else 0
        self._kept = torch.zeros(0, branch.dim * (1 + modalities), device=device)  # [S, V]
        self._count = 0  # rows of it that are used

    def __call__(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches with the vectors of their `content_items`."""
        for batch in batches:
            yield replace(batch, content={}, content_vectors=self.vectors(batch.content_items))

    @torch.no_grad()
    def vectors(
        self,
        items: Tensor,  # int64 [E], on the host
    ) -> Tensor:  # [E, V], on the device
        """Return the vectors of items, as `ContentBranch.encode` computes them."""
        ids = items.numpy()
        rows = self.store.rows_of(ids)
        new = np.flatnonzero(self._places[rows] < 0)
        made = self._encode(ids[new])
        self._keep(rows[new], made)
        places = torch.from_numpy(self._places[rows]).to(self.device)
        if not (self._places[rows] < 0).any():
            return self._kept.index_select(0, places)
        vectors = self._kept.index_select(0, places.clamp(min=0))
        vectors[torch.from_numpy(new).to(self.device)] = made
        return vectors

    def _encode(self, ids: np.ndarray) -> Tensor:  # [E] -> [E, V]
        parts = [self._kept[:0]]
        for start in range(0, len(ids), ITEMS_PER_CALL):
            content = self.store.gather(ids[start : start + ITEMS_PER_CALL])
            inputs = {name: part.to(self.device) for name, part in content.items()}
            parts.append(self.branch.encode(inputs))
        return torch.cat(parts)

    def _keep(self, rows: np.ndarray, vectors: Tensor) -> None:  # [E], [E, V]
        """Keep vectors as far as they fit."""
        most = max(1, self.most_bytes // (vectors.shape[1] * vectors.element_size()))
        kept = min(len(rows), most - self._count)
        end = self._count + kept
        if end > len(self._kept):
            size = min(most, max(2 * end, ITEMS_PER_CALL))
            larger = self._kept.new_zeros(size, self._kept.shape[1])
            larger[: self._count] = self._kept[: self._count]
            self._kept = larger
        self._kept[self._count : end] = vectors[:kept]
        self._places[rows[:kept]] = np.arange(self._count, end)
        self._count = end
