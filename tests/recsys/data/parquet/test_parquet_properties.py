"""Whatever way impressions are written, batches hold what a slow reading in plain Python gives.

Properties over arbitrary tables: any list lengths, null lists, integer and list types, files, row
groups and encodings, any number of ranks and batch size, shuffled or not.
"""

import math
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as some
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.data import row_source
from recsys.data.batch import Batch
from recsys.data.batch_builder import BatchBuilder
from recsys.data.interactions import Interactions
from recsys.data.parquet.bad_rows import OnBadRow
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.storage.location import Location
from tests.datasets import NUM_GENRES, SCHEMA

NUM_USERS, NUM_ITEMS = 10, 30
INTEGERS = [getattr(pa, f"{sign}int{bits}")() for sign in ("", "u") for bits in (8, 16, 32, 64)]
FLOATS = [pa.float16(), pa.float32(), pa.float64()]
LISTS = [pa.list_, pa.large_list]
MANY = settings(max_examples=25, deadline=None, database=None, derandomize=True)

users, items = some.integers(0, NUM_USERS - 1), some.integers(0, NUM_ITEMS - 1)
genres = some.integers(0, NUM_GENRES - 1)
numbers = some.integers(-2000, 2000).map(lambda number: number / 8)  # which 16 bits hold


@some.composite
def rows_of_history(draw: some.DrawFn) -> tuple[list[int] | None, list[float] | None]:
    """A history and the list beside it; an empty one may be null."""
    history = draw(some.lists(items, max_size=4))
    liked = [draw(numbers) for _ in history]
    empty: some.SearchStrategy[Any] = some.none() | some.just([])
    return (history, liked) if history else (draw(empty), draw(empty))


@some.composite
def impressions(draw: some.DrawFn) -> dict[str, Any]:
    """One row."""
    history, liked = draw(rows_of_history())
    return {
        "user": draw(users),
        "item": draw(items),
        "history": history,
        "history_liked": liked,
        "genres": draw(some.none() | some.lists(genres, max_size=3)),
        "price": draw(numbers),
        "liked": draw(some.sampled_from([0, 1])),
    }


def array_of(values: list[Any], kind: pa.DataType) -> pa.Array:
    return pa.array(map(bool, values) if pa.types.is_boolean(kind) else values, kind)


@dataclass(frozen=True)
class FileLayout:
    """How rows become files."""

    cuts: list[int]  # rows of each file but the last
    row_group_size: int
    kinds: dict[str, pa.DataType]
    options: dict[str, Any]

    def write(self, rows: list[dict[str, Any]], folder: Path) -> Path:
        (folder / "train").mkdir()
        sizes = {"num_users": NUM_USERS, "num_items": NUM_ITEMS, "num_genres": NUM_GENRES}
        (folder / "schema.yaml").write_text(SCHEMA.format(**sizes))
        bounds = [
            0,
            *sorted({min(cut, len(rows)) for cut in self.cuts} - {0, len(rows)}),
            len(rows),
        ]
        for file, (first, last) in enumerate(pairwise(bounds)):
            columns = {
                name: array_of([row[name] for row in rows[first:last]], kind)
                for name, kind in self.kinds.items()
            }
            path = folder / "train" / f"part-{file}.parquet"
            pq.write_table(pa.table(columns), path, self.row_group_size, **self.options)
        return folder


@some.composite
def ways_to_write(draw: some.DrawFn) -> FileLayout:
    integer, number, flavour = (some.sampled_from(kinds) for kinds in (INTEGERS, FLOATS, LISTS))
    kinds = {
        "user": draw(integer),
        "item": draw(integer),
        "history": draw(flavour)(draw(integer)),
        "history_liked": draw(flavour)(draw(number)),
        "genres": draw(flavour)(draw(integer)),
        "price": draw(number),
        "liked": draw(some.sampled_from([pa.bool_(), pa.int8(), pa.float64()])),
    }
    options = {
        "use_dictionary": draw(some.booleans()),
        "data_page_version": draw(some.sampled_from(["1.0", "2.0"])),
        "write_page_checksum": draw(some.booleans()),
        "compression": draw(some.sampled_from(["none", "snappy", "zstd"])),
    }
    cuts = draw(some.lists(some.integers(1, 30), max_size=2))
    return FileLayout(cuts, draw(some.integers(1, 9)), kinds, options)


@dataclass(frozen=True)
class Reading:
    """Who reads."""

    world_size: int
    batch_size: int
    seed: int | None
    shuffle_rows: int

    def batches(self, data: Path, on_bad_row: OnBadRow = "error") -> list[list[Batch]]:
        """Of every rank."""
        root = Location.of(data)
        schema = load_schema(root)
        rows = ParquetRows.of_split(root, "train", schema, on_bad_row)
        build = BatchBuilder(schema, ["user", "genres"])
        with patch.object(row_source, "SHUFFLE_ROWS", self.shuffle_rows):
            return [
                list(Interactions(rows, build, self.batch_size, rank, self.world_size, self.seed))
                for rank in range(self.world_size)
            ]


readings = some.builds(
    Reading,
    world_size=some.integers(1, 3),
    batch_size=some.integers(1, 7),
    seed=some.none() | some.integers(0, 5),
    shuffle_rows=some.sampled_from([3, 10, 1000]),
)
tables = some.lists(impressions(), min_size=3, max_size=16)


def lists_of(features: KeyedJaggedTensor, name: str) -> list[list[int]]:
    return [row.tolist() for row in features[name].to_dense()]


def rows_of(batch: Batch) -> dict[int, dict[str, Any]]:
    """The impressions of a batch by their place in the files, read back from its tensors."""
    assert batch.sparse_features is not None
    ends = batch.history.lengths.cumsum(0).tolist()
    liked = batch.history.values[:, 0].tolist()
    history = batch.history.items[batch.history.index].tolist()
    target = batch.content.items[batch.content.target_index]
    assert target.equal(batch.target.items)
    bags = {name: lists_of(batch.sparse_features, name) for name in ("user", "genres")}
    targets = lists_of(batch.sequence_features, "item")
    assert batch.sequence_features["history"].values().equal(batch.history.items)
    rows_by_position = {}
    for row, position in enumerate(batch.rows.positions.tolist()):
        first, last = ([0, *ends])[row], ends[row]
        assert targets[row] == [target[row]]
        assert bags["user"][row] == [batch.rows.groups[row]] or position < 0
        if position >= 0:
            rows_by_position[position] = {
                "user": int(batch.rows.groups[row]),
                "item": int(target[row]),
                "history": history[first:last],
                "history_liked": liked[first:last],
                "genres": bags["genres"][row],
                "price": float(batch.dense_features[row, 0]),
                "liked": int(batch.labels[row, 0]),
            }
    return rows_by_position


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    return {name: [] if value is None else value for name, value in row.items()}


def read_back(batches: list[list[Batch]]) -> dict[int, dict[str, Any]]:
    """All ranks' rows; none is there twice."""
    rows_by_position: dict[int, dict[str, Any]] = {}
    for rank in batches:
        for batch in rank:
            rows = rows_of(batch)
            assert not rows_by_position.keys() & rows.keys()
            rows_by_position |= rows
    return rows_by_position


@MANY
@given(rows=tables, way=ways_to_write(), reading=readings)
def test_every_row_is_in_one_batch_of_one_rank_as_it_was_written(
    rows: list[dict[str, Any]], way: FileLayout, reading: Reading
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        actual = read_back(reading.batches(way.write(rows, Path(folder))))
    assert actual == dict(enumerate(map(without_nulls, rows)))


WIDE = {
    "user": pa.int64(),
    "item": pa.int64(),
    "history": pa.list_(pa.int64()),
    "history_liked": pa.list_(pa.float32()),
    "genres": pa.list_(pa.int64()),
    "price": pa.float64(),
    "liked": pa.float64(),
}
BAD_VALUES: dict[str, list[Any]] = {
    "user": [None, -1, NUM_USERS, 2**62],
    "item": [None, -(2**63), NUM_ITEMS],
    "genres": [[NUM_GENRES], [0, None], [-1, -1]],
    "price": [None, math.nan, math.inf, -1e300],
    "liked": [None, 0.5, -1, math.nan],
}
bad_values = some.fixed_dictionaries(
    {}, optional={name: some.sampled_from(values) for name, values in BAD_VALUES.items()}
)


@MANY
@given(
    rows=some.lists(
        some.tuples(impressions(), some.just({}) | bad_values), min_size=3, max_size=12
    ),
    row_group_size=some.integers(1, 9),
    reading=readings,
)
def test_exactly_the_rows_with_bad_values_are_skipped(
    rows: list[tuple[dict[str, Any], dict[str, Any]]], row_group_size: int, reading: Reading
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        way = FileLayout([5], row_group_size, WIDE, {})
        data = way.write([row | bad for row, bad in rows], Path(folder))
        actual = read_back(reading.batches(data, "skip"))
    assert actual == {index: without_nulls(row) for index, (row, bad) in enumerate(rows) if not bad}
