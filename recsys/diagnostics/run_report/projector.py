"""Writes what a run has learned of items for TensorBoard's projector: vectors, names, pictures.

Shapes: I items, D ID dimension, E content dimension.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from recsys.build import Job
from recsys.checkpoint.table_export import stored_tables
from recsys.data.item_frequency import ItemCounts
from recsys.data.items.item_table import ItemTable
from recsys.diagnostics.run_report.item_metadata import categories, item_names, item_pictures

ITEMS_PER_CALL = 256
CONFIG = "projector_config.pbtxt"  # of TensorBoard's projector


def check_folder(folder: Path) -> None:
    """Check that a folder is new or has an earlier projector, which is replaced.

    Raises:
        ValueError: the folder has something else.
    """
    if folder.exists() and not (folder / CONFIG).exists():
        raise ValueError(
            f"{folder}: is no projector of a report; move it away, or name another --out"
        )


def write_projector(
    folder: Path,
    job: Job,
    run: Path,
    item_counts: ItemCounts,
    most_items: int,
    table: ItemTable | None,
    category: str | None,
) -> int:
    """Write the vectors of the items most frequent in training, of a job from `load_run`.

    An earlier projector in `folder` is replaced. `category` is the column of `table` to colour by.

    Returns:
        The number of items written.
    """
    items = frequent_items(job, item_counts, most_items)
    if not len(items):
        return 0
    vectors = item_vectors(job, run, items)
    columns = {
        "name": item_names(table, items),
        "impressions": [str(count) for count in item_counts.of(items).tolist()],
    }
    if table is not None and category is not None:
        columns[category] = [value or "" for value in categories(table, category, items)]
    pictures = item_pictures(table, items)
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for kind, matrix in vectors.items():
            rows = [list(row) for row in zip(*columns.values())]
            writer.add_embedding(matrix, rows, pictures, tag=kind, metadata_header=[*columns])
    return len(items)


def frequent_items(job: Job, item_counts: ItemCounts, most: int) -> np.ndarray:  # int64 [I]
    """Return the most frequent items in training; with content, if the model has it."""
    items = item_counts.items
    if job.store is not None:
        items = np.intersect1d(items, job.store.items.ids)
    return items[np.argsort(-item_counts.of(items), kind="stable")][:most]


@torch.no_grad()
def item_vectors(
    job: Job,
    run: Path,
    items: np.ndarray,  # int64 [I], with content if the model has a content branch
) -> dict[str, Tensor]:  # [I, D] and [I, E], by kind
    """Return vectors of the best model, before and after the contrastive maps. Not a collective."""
    table = stored_tables(run / "checkpoints" / "best")[job.schema.target_item]
    ids = torch.cat([table.rows(row, row + 1) for row in _rows_of(job, items).tolist()])
    branch, store = job.em3.content, job.store
    if branch is None or store is None:
        return {"ID": ids}
    branch.eval()
    device, parts = job.ranks.device, []
    for chunk in np.split(items, range(ITEMS_PER_CALL, len(items), ITEMS_PER_CALL)):
        inputs = {name: part.to(device) for name, part in store.gather(chunk).items()}
        parts.append(branch.encode(inputs)[:, : branch.dim].float().cpu())
    vectors = {"ID": ids, "content": torch.cat(parts)}
    if (loss := job.em3.losses.contrastive) is not None:
        vectors["ID_after_CIC"] = loss.id_map(ids.to(device)).cpu()
        vectors["content_after_CIC"] = loss.content_map(vectors["content"].to(device)).cpu()
    return vectors


def _rows_of(job: Job, items: np.ndarray) -> Tensor:  # int64 [I]
    """Return the rows of items in their table, that of unknown ids for those without one."""
    ids, find = torch.from_numpy(items), job.vocabularies.find_items
    if find is None:
        return ids
    rows = find(ids)
    return rows.where(rows >= 0, job.schema.num_items - 1)
