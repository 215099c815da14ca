"""Batches against a loop over Python lists, and every rank's share against the whole split."""

from itertools import product
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.config import ModalitySettings
from recsys.data.batch_builder import BatchBuilder
from recsys.data.interactions import Interactions
from recsys.data.items.content_store import ContentStore
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.columns import RowColumns
from recsys.data.parquet.rows import ParquetRows
from recsys.data.parquet.values import ROW_POSITION
from recsys.data.row_source import Window
from recsys.data.schema import load_schema
from recsys.storage.location import Location
from tests.datasets import FEATURE_WIDTH, write_dataset, write_parquet


def rows_of(root: Path | str, split: str = "train") -> ParquetRows:
    location = Location.of(root)
    return ParquetRows.of_split(location, split, load_schema(location))


def python_rows(root: Path, split: str = "train") -> list[dict[str, Any]]:
    files = sorted((root / split).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def expected_batch(rows: list[dict[str, Any]], encode_history: bool) -> dict[str, Any]:
    """What a batch of these rows must hold, by the plainest loop."""
    target = [row["item"] for row in rows]
    history = [item for row in rows for item in row["history"] or []]
    unique = sorted({*history})
    items = sorted({*target, *history} if encode_history else {*target})
    return {
        "dense_features": [[row["price"]] for row in rows],
        "labels": [[row["liked"]] for row in rows],
        "target.items": target,
        "rows.groups": [row["user"] for row in rows],
        "history.lengths": [len(row["history"] or []) for row in rows],
        "history.values": [[flag] for row in rows for flag in row["history_liked"] or []],
        "content.items": items,
        "content.target_index": [items.index(item) for item in target],
        "history.items": unique,
        "history.index": [unique.index(item) for item in history],
        "content.history_index": [items.index(item) for item in unique] if encode_history else [],
    }


@pytest.mark.parametrize("encode_history", [False, True])
def test_every_column_arrives_where_it_belongs(tmp_path: Path, encode_history: bool) -> None:
    rows = rows_of(write_dataset(tmp_path))
    build = BatchBuilder(rows.schema, ["genres", "user"], encode_history=encode_history)
    all_rows = python_rows(tmp_path)
    num_rows = 0
    for batch in Interactions(rows, build, 7):
        mine = [all_rows[position] for position in batch.rows.positions]
        num_rows += len(mine)
        assert batch.batch_size == len(mine)
        for name, expected in expected_batch(mine, encode_history).items():
            assert attrgetter(name)(batch).tolist() == expected, name
        assert batch.sparse_features is not None
        assert batch.sparse_features.keys() == ["genres", "user"]
        genres, user = (batch.sparse_features[name] for name in ("genres", "user"))
        assert genres.lengths().tolist() == [len(row["genres"]) for row in mine]
        assert genres.values().tolist() == [genre for row in mine for genre in row["genres"]]
        assert user.values().tolist() == batch.rows.groups.tolist()
        assert batch.sequence_features.keys() == ["item", "history"]
        item, history = (batch.sequence_features[name] for name in ("item", "history"))
        assert item.values().tolist() == batch.target.items.tolist()
        assert item.lengths().tolist() == [1] * len(mine)
        # Unique ids belong to no row; they are in the first one.
        ids = sorted({item for row in mine for item in row["history"] or []})
        assert history.lengths().tolist() == [len(ids)] + [0] * (len(mine) - 1)
        assert history.values().tolist() == ids
        assert batch.content.inputs == {}
    assert num_rows == len(all_rows) == 60


def test_a_dataset_may_lack_history_dense_and_pooled_columns(tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text(
        "target_item: item\ngroup: user\ncolumns:\n  user: {kind: id, num_embeddings: 3}\n"
        "  item: {kind: id, num_embeddings: 9}\n  liked: {kind: label}\n  seen: {kind: label}\n"
    )
    table = pa.table({"user": [0, 2], "item": [8, 8], "liked": [1, 0], "seen": [1.0, 1.0]})
    write_parquet(tmp_path / "train" / "a.parquet", table)
    rows = rows_of(tmp_path)
    (batch,) = Interactions(rows, BatchBuilder(rows.schema, []), 8)
    assert batch.sparse_features is None
    assert batch.sequence_features.keys() == ["item"]
    assert batch.labels.tolist() == [[1, 1], [0, 1]]
    assert (batch.dense_features.shape, batch.history.values.shape) == ((2, 0), (0, 0))
    assert batch.history.lengths.tolist() == [0, 0]
    assert batch.history.index.tolist() == []
    assert (batch.content.items.tolist(), batch.content.target_index.tolist()) == ([8], [0, 0])


@pytest.mark.parametrize("encode_history", [False, True])
def test_a_batch_carries_the_content_of_its_unique_items(
    tmp_path: Path, encode_history: bool
) -> None:
    root = Location.of(write_dataset(tmp_path / "data"))
    schema = load_schema(root)
    settings = {"clip": ModalitySettings(kind="feature", column="clip")}
    store = ContentStore(ItemTable(root, schema), settings, tmp_path / "cache")
    store.build("clip")
    items = {row["item"]: row["clip"] for row in python_rows(tmp_path / "data", "items")}
    build = BatchBuilder(schema, [], store, encode_history)
    for batch in Interactions(ParquetRows.of_split(root, "train", schema), build, 9):
        clip = batch.content.inputs["clip"]
        for item, values, mask in zip(batch.content.items.tolist(), clip.values, clip.mask):
            assert mask.item() == (items[item] is not None)
            expected = items[item] or [0.0] * FEATURE_WIDTH
            np.testing.assert_allclose(values[0], expected, rtol=1e-6)


class CountedRows(ParquetRows):
    """So many rows without a file."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def windows(
        self, start: int, stop: int, shuffle_seed: tuple[int, int] | None = None
    ) -> list[Window]:
        return [Window(start, stop)] if start < stop else []

    def read_window(self, window: Window, shuffle_seed: tuple[int, int] | None = None) -> pa.Table:
        return pa.table({ROW_POSITION: np.arange(window.start, window.stop)})

    def padding(self, num_rows: int) -> pa.Table:
        return pa.table({ROW_POSITION: np.full(num_rows, -1)})


def positions_only(rows: RowColumns) -> Any:
    """Stands for a batch where only the places of its rows matter."""
    positions = torch.from_numpy(rows.numbers[ROW_POSITION])
    return SimpleNamespace(rows=SimpleNamespace(positions=positions))


def test_all_ranks_have_as_many_batches_of_the_same_sizes_for_any_numbers() -> None:
    for num_rows, world_size, batch_size in product(range(1, 41), range(1, 8), range(1, 7)):
        rows, case = CountedRows(num_rows), (num_rows, world_size, batch_size)
        sizes, counted = [], []
        for rank in range(world_size):
            interactions = Interactions(rows, positions_only, batch_size, rank, world_size)  # type: ignore[arg-type]
            batches = [batch.rows.positions.tolist() for batch in interactions]
            assert len(batches) == len(interactions), case
            sizes.append([len(batch) for batch in batches])
            counted += [position for batch in batches for position in batch if position >= 0]
        assert all(rank_sizes == sizes[0] for rank_sizes in sizes), case
        assert min(sizes[0]) >= 1 and max(sizes[0]) <= batch_size, case
        assert max(sizes[0]) - min(sizes[0]) <= 1, case
        assert counted == list(range(num_rows)), case
