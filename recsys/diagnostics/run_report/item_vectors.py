"""Reads the vectors of items that a run has learned: from the ID table, and from content.

Shapes: I chosen items, D ID dimension, E content dimension, C dimension of the contrastive loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recsys.build import Job
from recsys.checkpoint.table_export import stored_tables
from recsys.data.item_frequency import ItemCounts

ITEMS_PER_CALL = 256


@dataclass(frozen=True)
class ItemVectors:
    """Vectors of the same items by kind; `contrastive` has those that the CIC loss compares."""

    items: np.ndarray  # int64 [I]
    ids: Tensor  # [I, D]
    content: Tensor | None = None  # [I, E]
    contrastive: tuple[Tensor, Tensor] | None = None  # IDs and content, [I, C] each

    def first(self, count: int) -> ItemVectors:
        """Return the vectors of the first `count` items."""
        contrastive = self.contrastive and (
            self.contrastive[0][:count],
            self.contrastive[1][:count],
        )
        content = None if self.content is None else self.content[:count]
        return ItemVectors(self.items[:count], self.ids[:count], content, contrastive)


def frequent_items(job: Job, item_counts: ItemCounts, most: int) -> np.ndarray:  # int64 [I]
    """Return the `most` most frequent items in training (with content, if the model has it)."""
    items = item_counts.items
    if job.store is not None:
        items = np.intersect1d(items, job.store.items.ids)
    return items[np.argsort(-item_counts.of(items), kind="stable")][:most]


@torch.no_grad()
def item_vectors(job: Job, run: Path, items: np.ndarray) -> ItemVectors:
    """Return vectors of the run's best model, which the job has loaded; not a collective.

    The items, int64 [I], have content if the model has a content branch. Only their rows are read
    from the run's checkpoint.
    """
    table = stored_tables(run / "checkpoints" / "best")[job.schema.target_item]
    ids = torch.cat([table.rows(row, row + 1) for row in _rows_of(job, items).tolist()])
    branch, store = job.em3.content, job.store
    if branch is None or store is None:
        return ItemVectors(items, ids)
    branch.eval()
    device, parts = job.ranks.device, []
    for some in np.split(items, range(ITEMS_PER_CALL, len(items), ITEMS_PER_CALL)):
        inputs = {name: part.to(device) for name, part in store.gather(some).items()}
        parts.append(branch.encode(inputs)[:, : branch.dim].float().cpu())
    content = torch.cat(parts)
    loss = job.em3.losses.contrastive
    if loss is None:
        return ItemVectors(items, ids, content)
    sides = loss.id_map(ids.to(device)).cpu(), loss.content_map(content.to(device)).cpu()
    return ItemVectors(items, ids, content, sides)


def _rows_of(job: Job, items: np.ndarray) -> Tensor:  # int64 [I]
    """Return the rows of items in their table, that of unknown ids for those without one."""
    ids, find = torch.from_numpy(items), job.vocabularies.find_items
    if find is None:
        return ids
    rows = find(ids)
    return rows.where(rows >= 0, job.schema.num_items - 1)
