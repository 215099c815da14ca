"""Training rows by item: sparse, added up over ranks, stored and looked up without dense arrays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import recsys.data.item_frequency
from recsys.data.item_frequency import ItemCounts, count_items
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.storage.location import Location
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import ranks_of

MANY = 1 << 40  # ids, whose counts would take 8 TiB


def counted(root: Path, rank: int, world_size: int) -> ItemCounts:
    """Items of a rank's share, of a schema that has an id for many more."""
    schema = load_schema(Location.of(root))
    columns = {**schema.columns, "item": replace(schema.columns["item"], num_embeddings=MANY)}
    many = replace(schema, columns=columns)
    assert many.num_items == MANY
    return count_items(ParquetRows.of_split(Location.of(root), "train", many), rank, world_size)


def add_up(rank: int, world_size: int, root: Path) -> tuple[list[int], list[int]]:
    recsys.data.item_frequency.BLOCK = 7 if world_size == 2 else 1 << 24
    size = 30 if world_size == 2 else MANY
    total = counted(root, rank, world_size).sum_of_ranks(size, ranks_of(rank, world_size))
    return total.items.tolist(), total.counts.tolist()


@pytest.mark.parametrize("world_size", [1, 2])
def test_items_are_counted_over_all_ranks_without_memory_for_all_ids(
    world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_dataset(tmp_path, {"train": 61})
    whole = counted(root, 0, 1)
    assert whole.counts.sum() == 61 and (np.diff(whole.items) > 0).all()
    first, *other_ranks = run_on_ranks(add_up, world_size, root)
    assert first == (whole.items.tolist(), whole.counts.tolist())
    assert all(result == ([], []) for result in other_ranks)
    monkeypatch.setattr(recsys.data.item_frequency, "LEAST_MERGED", 1)  # after each chunk
    assert counted(root, 0, 1).counts.tolist() == whole.counts.tolist()


def test_counts_are_stored_and_looked_up(tmp_path: Path) -> None:
    dense = np.array([0, 3, 0, 0, 1, 0])
    queries = np.array([5, 4, 4, 0, 1, 900])
    ItemCounts(np.array([1, 4]), np.array([3, 1])).save(tmp_path / "counts.npy")
    np.save(tmp_path / "dense.npy", dense)  # of an earlier run
    for file in ("counts.npy", "dense.npy"):
        counts = ItemCounts.load(tmp_path / file)
        assert counts.of(queries).tolist() == [0, 1, 1, 0, 3, 0]
        assert counts.of(np.arange(6)).tolist() == dense.tolist()
    nothing = ItemCounts(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert nothing.of(queries).tolist() == [0] * 6
