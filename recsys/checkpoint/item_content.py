"""Encode items that were edited after training into the memory bank again.

Loading finds them by the hashes in `RUN/item_content/DIGEST.npy`. N: items with a row there.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recsys.build import Job
from recsys.content.item_vectors import encode_into_bank
from recsys.data.items.item_table import digest_of
from recsys.storage.files import atomic_file

logger = logging.getLogger(__name__)

FOLDER = "item_content"
TYPE = np.dtype([("item", "<i8"), ("content", "<u8")])
NewRows = Callable[[np.ndarray], np.ndarray]  # [N] -> [N]


@dataclass(frozen=True)
class ChangedItems:
    """Items whose content differs from that at a checkpoint."""

    ids: np.ndarray
    edited: int
    num_known: int  # items that the checkpoint had, too
    summary: str


def item_content_digest(job: Job) -> str | None:
    """Return a hash of the content of all items; None for a model without memory bank."""
    return None if (content := _content(job)) is None else digest_of(content.tobytes())


def keep_item_content(run: Path, job: Job) -> None:
    """Keep the hashes of the job's items in the run's folder."""
    if (content := _content(job)) is None:
        return
    path = run / FOLDER / f"{digest_of(content.tobytes())}.npy"
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.save(file, content)


def encode_changed_items(
    job: Job, run: Path, manifest: dict[str, Any], new_rows: NewRows | None = None
) -> None:
    """Encode the items that differ from those of a loaded checkpoint. A collective.

    `new_rows` maps old ids to current ones, -1 if there is none; None: ids are the same. A
    ValueError on every rank if ranks read other items.
    """
    ranks = job.ranks
    if len(set(ranks.gather(item_content_digest(job)))) > 1:
        raise ValueError(f"{job.root}/items: the ranks read different items; give them one dataset")
    with ranks.raise_on_all_ranks():
        changed = changed_items(job, run, manifest, new_rows)
    if changed is None or not len(changed.ids):  # the same, or only in other rows
        return
    assert job.em3.content is not None and job.store is not None
    find = job.vocabularies.find_items
    encode_into_bank(job.em3.content, job.store, ranks, ids=changed.ids, find=find)
    if ranks.is_first:
        logger.info("%s/items: %s; encoded into the memory bank again", job.root, changed.summary)


def changed_items(
    job: Job, run: Path, manifest: dict[str, Any], new_rows: NewRows | None = None
) -> ChangedItems | None:
    """Compare the items with those at a checkpoint; None if nothing differs. Not a collective."""
    items, stored = _content(job), manifest["items"]
    if items is None or stored is None:
        return None
    if new_rows is None and digest_of(items.tobytes()) == stored:
        return None
    file = run / FOLDER / f"{stored}.npy"
    stored_items = np.load(file, allow_pickle=False) if file.is_file() else np.zeros(0, TYPE)
    if digest_of(stored_items.tobytes()) != file.stem:
        summary = f"{file} is missing or damaged, so all {len(items):,} items are taken as changed"
        return ChangedItems(items["item"].copy(), 0, 0, summary)
    if new_rows is not None:
        stored_items["item"] = new_rows(stored_items["item"])
        stored_items = np.sort(stored_items[stored_items["item"] >= 0], order="item")
    is_stored = np.isin(items["item"], stored_items["item"], assume_unique=True)
    index = np.searchsorted(stored_items["item"], items["item"][is_stored])
    edited = is_stored.copy()
    edited[is_stored] = stored_items["content"][index] != items["content"][is_stored]
    removed = np.setdiff1d(stored_items["item"], items["item"], assume_unique=True)
    summary = (
        f"since the checkpoint was written {edited.sum():,} of {len(items):,} items were edited, "
        f"{(~is_stored).sum():,} are new and {len(removed):,} are gone"
    )
    ids = np.sort(np.concatenate([items["item"][edited | ~is_stored], removed]))
    return ChangedItems(ids, int(edited.sum()), int(is_stored.sum()), summary)


def _content(job: Job) -> np.ndarray | None:  # TYPE [N], by item
    if job.store is None or job.em3.content is None or job.em3.content.bank is None:
        return None
    items, hashes = job.store.item_hashes()
    content = np.empty(len(items), TYPE)
    content["item"], content["content"] = items, hashes
    return content
