"""Read the rows that a peer trains on, and write its scores; needs only numpy.

Shapes: N rows of a split, H history items of a split, I items, V width of all modalities, L history
length.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Rows:
    """Rows of a split, and the histories of all of them one after another."""

    user: np.ndarray  # int64 [N]
    item: np.ndarray  # int64 [N]
    label: np.ndarray  # float32 [N]
    offsets: np.ndarray  # int64 [N + 1], of each row's history, oldest first
    history: np.ndarray  # int64 [H]
    parallel: dict[str, np.ndarray]  # float32 [H] each: parallel lists by name
    numbers: np.ndarray | None = None  # float32 [N, K], such as counts of the item

    @classmethod
    def read(cls, folder: Path, split: str) -> Rows:
        with np.load(folder / f"{split}.npz") as arrays:
            columns = {name: arrays[name] for name in arrays.files}
        names = ("user", "item", "label", "offsets", "history")
        numbers = columns.pop("numbers", None)
        for name in ("group", "sampled"):  # for the metrics alone
            columns.pop(name, None)
        return cls(*(columns.pop(name) for name in names), columns, numbers)

    def __len__(self) -> int:
        return len(self.item)

    @property
    def dense(self) -> np.ndarray:  # float32 [N, K]
        """The numbers, [N, 0] without them."""
        return np.zeros((len(self), 0), np.float32) if self.numbers is None else self.numbers

    def padded(self, values: np.ndarray, length: int) -> np.ndarray:  # [H] -> [N, L]
        """Return the last `length` values of each history, oldest first, zeros before them."""
        index = self.offsets[1:, None] - np.arange(length, 0, -1)[None, :]
        inside = index >= self.offsets[:-1, None]
        return np.where(inside, values[np.maximum(index, 0)], 0) if len(values) else inside * 0


POOL = 16  # batches whose rows are sorted by length together


def batches_by_length(
    lengths: np.ndarray, size: int, random: np.random.Generator
) -> list[np.ndarray]:
    """Return the row indices of each batch: random pools of rows, cut by their history lengths.

    A batch of random rows is nearly always as long as the longest history, most of it padding.
    """
    order, batches = random.permutation(len(lengths)), []
    for first in range(0, len(order), POOL * size):
        pool = order[first : first + POOL * size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches_of_pool = [pool[index : index + size] for index in range(0, len(pool), size)]
        batches += [batches_of_pool[index] for index in random.permutation(len(batches_of_pool))]
    return batches


def padded_behind(rows: Rows, length: int) -> dict[str, np.ndarray]:
    """Return columns of RecBole: the last `length` items [N, L], their number, and the target."""
    padded = rows.padded(rows.history + 1, length)
    lengths = np.minimum(np.diff(rows.offsets), length)
    indices = (np.arange(length)[None, :] + (length - lengths)[:, None]) % length
    return {
        "item_id_list": np.take_along_axis(padded, indices, axis=1),
        "item_length": np.maximum(lengths, 1),
        "item_id": rows.item + 1,
    }


def item_vectors(folder: Path) -> list[np.ndarray]:  # float32 [I, V] of each modality
    """Return the vectors of items, of unit length or zero."""
    widths = np.load(folder / "widths.npy")
    return np.split(np.load(folder / "item_vectors.npy"), np.cumsum(widths)[:-1], axis=1)


def principal_components(vectors: list[np.ndarray], width: int) -> np.ndarray:  # float32 [I, V]
    """Return the first principal components of the vectors of all modalities, of variance 1."""
    joined = np.concatenate(vectors, axis=1)
    centred = joined - joined.mean(axis=0)
    values, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    components = centred @ axes[:, ::-1][:, :width]
    return (components / np.sqrt(np.maximum(values[::-1][:width], 1e-12))).astype(np.float32)


def order_within_users(rows: Rows, values: np.ndarray) -> float:  # [N]
    """Return the share of a user's pairs with different labels that the values order correctly."""
    correct = pairs = 0.0
    for user in np.unique(rows.user):
        is_user = rows.user == user
        label = rows.label[is_user] > 0.5
        positives, negatives = values[is_user][label], values[is_user][~label]
        correct += float((positives[:, None] > negatives[None, :]).sum())
        pairs += positives.size * negatives.size
    return correct / max(pairs, 1)


@dataclass(frozen=True)
class PeerJob:
    """A training: the folder of the rows, the settings of a trial, a seed, and its output."""

    rows: Path
    settings: dict[str, Any]
    seed: int
    out: Path

    @classmethod
    def of_command_line(cls) -> PeerJob:
        job = json.loads(Path(sys.argv[1]).read_text())
        return cls(Path(job["rows"]), job["settings"], job["seed"], Path(job["out"]))

    def read(self) -> dict[str, Rows]:
        return {split: Rows.read(self.rows, split) for split in SPLITS}

    def write(self, start: float, **scores: np.ndarray) -> None:  # float [N] each
        """Write the scores of splits by name, and the cost since `start` (`time.perf_counter`)."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        cost = {"seconds": time.perf_counter() - start, "peak": peak}
        np.savez(self.out, **scores, **{name: np.array(value) for name, value in cost.items()})
