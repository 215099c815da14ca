"""Raw ids on their way into batches: rows where they are known, unknown ones in the last row."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.vocabulary.fixed import HashVocabulary, integer_ids
from recsys.content.batch_preparation import BatchPreparation
from recsys.data.batch import Batch
from recsys.data.batch_builder import BatchBuilder
from recsys.data.interactions import Interactions
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.bad_rows import OnBadRow
from recsys.data.parquet.rows import ParquetRows
from recsys.data.prepare import prepare_vocabularies
from recsys.data.schema import Schema, load_schema
from recsys.data.vocabularies import BoundedVocabularies, UnknownIds, format_unknown
from recsys.storage.location import Location
from tests.datasets import write_parquet
from tests.ranks import run_on_ranks
from tests.recsys.data.batch_tensors import tensors_in
from tests.recsys.data.raw_ids import (
    ITEM_ROWS,
    ITEMS,
    TEST,
    TRAIN,
    write_raw_dataset,
    write_rows_dataset,
)

POOLED = ["user", "friends", "words"]
BOUNDED = "{kind: bounded}"


def rows_of(data: Path, split: str = "train", on_bad_row: OnBadRow = "error") -> ParquetRows:
    root = Location.of(data)
    return ParquetRows.of_split(root, split, load_schema(root), on_bad_row)


def batch_of(data: Path, split: str = "train") -> Batch:
    rows = rows_of(data, split)
    return BatchBuilder(rows.schema, POOLED)(rows.read_window(rows.windows(0, rows.num_rows)[0]))


def lists_of(features: KeyedJaggedTensor | None, name: str) -> list[list[int]]:
    assert features is not None
    lengths = features[name].lengths().tolist()
    return [ids_of_row.tolist() for ids_of_row in features[name].values().split(lengths)]


def prepared(data: Path) -> Path:
    prepare_vocabularies(str(data))
    return data


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_batch_of_raw_ids_is_that_of_their_rows(tmp_path: Path, split: str) -> None:
    batch = batch_of(prepared(write_raw_dataset(tmp_path / "raw")), split)
    expected = batch_of(write_rows_dataset(tmp_path / "rows"), split)
    expected.rows.groups = batch.rows.groups
    for actual, tensor in zip(tensors_in(batch), tensors_in(expected), strict=True):
        assert torch.equal(actual, tensor)


def test_unknown_ids_have_the_last_row_and_stay_apart_as_groups(tmp_path: Path) -> None:
    data = prepared(write_raw_dataset(tmp_path / "data"))
    late = pa.table({**TRAIN, "user": ["new", "newer", "ann"], "item": [1, 2, -7]})
    write_parquet(data / "valid" / "part-0.parquet", late)
    batch = batch_of(data, "valid")
    assert lists_of(batch.sparse_features, "user") == [[5], [5], [0]]
    assert lists_of(batch.sequence_features, "item") == [[7], [7], [0]]
    assert batch.target.items.tolist() == [7, 7, 0]
    assert batch.rows.groups.tolist() == integer_ids(pa.array(["new", "newer", "ann"])).tolist()


def test_a_hashed_id_has_as_many_rows_as_hashes_in_every_column_of_its_table(
    tmp_path: Path,
) -> None:
    two_hashes = "{kind: hash, num_hashes: 2, seed: 3}"
    data = write_raw_dataset(tmp_path, user=two_hashes, item="{kind: hash}", words="{kind: hash}")
    batch = batch_of(data)

    def hashed(ids: list[Any], *sizes: int) -> list[int]:
        array = pa.array(ids, pa.string() if sizes[0] != 8 else pa.int64())
        return HashVocabulary(*sizes).rows_of(array).reshape(-1).tolist()

    users, words = [[user] for user in TRAIN["user"]], [["x"], [], ["y", "x"]]
    items = [[item] for item in TRAIN["item"]]
    assert lists_of(batch.sparse_features, "user") == [hashed(ids, 6, 2, 3) for ids in users]
    assert lists_of(batch.sparse_features, "friends") == [
        hashed(ids, 6, 2, 3) for ids in TRAIN["friends"]
    ]
    assert lists_of(batch.sparse_features, "words") == [hashed(ids, 9) for ids in words]
    assert lists_of(batch.sequence_features, "item") == [hashed(ids, 8) for ids in items]
    assert batch.rows.groups.tolist() == integer_ids(pa.array(TRAIN["user"])).tolist()


def bounded_dataset(folder: Path) -> Path:
    return write_raw_dataset(folder, user=BOUNDED, item="{kind: hash}", words=BOUNDED)


def test_bounded_columns_are_raw_until_they_are_mapped_in_the_batch(tmp_path: Path) -> None:
    batch = batch_of(bounded_dataset(tmp_path))
    schema = rows_of(tmp_path).schema
    keys = integer_ids(pa.array(["ann", "bob", "eve"])).tolist()
    assert lists_of(batch.sparse_features, "friends") == [[keys[1]], [], [keys[1], keys[2]]]
    assert batch.sparse_features is not None
    memory = batch.sparse_features.values().data_ptr()
    vocabularies = BoundedVocabularies(schema, POOLED)
    vocabularies.map_batch(batch, step=0, training=True)
    row = dict(
        zip(
            ["ann", "bob", "eve"],
            vocabularies.by_table["user"].rows_of(torch.tensor(keys), 0, False).tolist(),
            strict=True,
        )
    )
    assert sorted(row.values()) == [0, 1, 2]
    assert lists_of(batch.sparse_features, "user") == [[row[user]] for user in TRAIN["user"]]
    assert lists_of(batch.sparse_features, "friends") == [
        [row[user] for user in users] for users in TRAIN["friends"]
    ]
    assert batch.sparse_features.values().data_ptr() == memory
    assert vocabularies.counts()["words"].known == 2


def test_evaluation_maps_what_is_known_and_admits_nothing(tmp_path: Path) -> None:
    data = bounded_dataset(tmp_path)
    vocabularies = BoundedVocabularies(rows_of(data).schema, POOLED)
    vocabularies.map_batch(batch_of(data), step=0, training=True)
    for _ in range(2):
        batch = batch_of(data, "test")
        vocabularies.map_batch(batch, step=1, training=False)
        assert lists_of(batch.sparse_features, "user") == [[5]]
        assert lists_of(batch.sparse_features, "friends") != [[5]]
        assert lists_of(batch.sparse_features, "words") == [[8]]


def test_padding_rows_are_neither_admitted_nor_counted(tmp_path: Path) -> None:
    data = bounded_dataset(tmp_path)
    rows = rows_of(data)
    batches = iter(Interactions(rows, BatchBuilder(rows.schema, POOLED), 8, 0, 2))
    vocabularies, unknown = BoundedVocabularies(rows.schema, POOLED), UnknownIds(rows.schema)
    prepare = BatchPreparation(None, None, None, vocabularies)
    (batch,) = prepare(batches, unknown, first_step=0, training=True)
    assert batch.rows.positions.tolist() == [0, -1]
    assert lists_of(batch.sparse_features, "user")[1] == [5]
    counts = vocabularies.counts()["user"]
    assert (counts.lookups, counts.admitted, counts.unknown) == (2, 2, 0)
    assert unknown.totals()["user"] == {"ids": 1, "unknown": 0}


def test_rows_that_change_hands_are_reset(tmp_path: Path) -> None:
    data, reset = bounded_dataset(tmp_path), list[tuple[str, list[int]]]()
    vocabularies = BoundedVocabularies(
        rows_of(data).schema, POOLED, reset=lambda table, rows: reset.append((table, rows.tolist()))
    )
    for step in range(8):
        batch = batch_of(data)
        assert batch.sparse_features is not None
        batch.sparse_features.values()[:] += step  # all ids are new in each step
        vocabularies.map_batch(batch, step, training=True)
    counts = vocabularies.counts()
    assert counts["user"].evicted > 0
    for table in ("user", "words"):
        rows = [row for name, rows in reset for row in rows if name == table]
        assert len(rows) == counts[table].evicted


def test_unknown_ids_are_told_by_column(tmp_path: Path) -> None:
    data = prepared(write_raw_dataset(tmp_path / "data", words="{kind: hash}"))
    late = pa.table({**TRAIN, "user": ["new", "newer", "ann"], "history": [[], [5], [40, -7]]})
    write_parquet(data / "valid" / "part-0.parquet", late)
    unknown = UnknownIds(load_schema(Location.of(data)))
    unknown.add(batch_of(data, "valid"))
    totals = unknown.totals()
    assert totals == {
        "user": {"ids": 3, "unknown": 2},
        "friends": {"ids": 3, "unknown": 0},
        "item": {"ids": 3, "unknown": 0},
        "history": {"ids": 3, "unknown": 1},
    }
    line = (
        "valid: unknown ids: user 2 of 3 (66.67%), friends 0 of 3 (0.00%), item 0 of 3 (0.00%), "
        "history 1 of 3 (33.33%)"
    )
    assert format_unknown("valid", totals) == format_unknown("valid", totals, {}) == line
    changes = {"user": {"admitted": 1_200, "evicted": 3}}
    line += "; table 'user': 1,200 admitted, 3 evicted"
    assert format_unknown("valid", totals, changes) == line


def count_on_two_ranks(rank: int, world_size: int, data: str) -> tuple[Any, Any, list[str]]:
    rows = rows_of(Path(data))
    batches = Interactions(rows, BatchBuilder(rows.schema, POOLED), 1, rank, world_size)
    vocabularies = BoundedVocabularies(rows.schema, POOLED, dist.group.WORLD)
    unknown = UnknownIds(rows.schema)
    prepare = BatchPreparation(None, None, None, vocabularies)
    assert len(list(prepare(iter(batches), unknown, 0, training=False))) == 2
    return (
        unknown.totals(dist.group.WORLD),
        vocabularies.counts()["user"].lookups,
        sorted(vocabularies.state_dict()),
    )


def test_counts_are_those_of_all_ranks(tmp_path: Path) -> None:
    data = bounded_dataset(tmp_path)
    for totals, lookups, names in run_on_ranks(count_on_two_ranks, 2, str(data)):
        assert totals["user"] == {"ids": 3, "unknown": 3}
        assert totals["friends"] == {"ids": 3, "unknown": 3}
        assert lookups == 6
        assert names == [
            f"{t}.{n}" for t in ("user", "words") for n in ("ids", "last_used", "scores")
        ]


def items_of(data: Path) -> ItemTable:
    return ItemTable(Location.of(data), load_schema(Location.of(data)))


def test_items_without_a_row_of_their_own_are_refused(tmp_path: Path) -> None:
    data = prepared(write_raw_dataset(tmp_path / "exact"))
    new_items = pa.table({"item": [-7, 99], "text": ["again", "new"]})
    write_parquet(data / "items" / "part-1.parquet", new_items.slice(1))
    with pytest.raises(
        ValueError, match=r"column 'item', row 0: id 99 .*recsys prepare vocabulary"
    ):
        items_of(data)
    write_parquet(data / "items" / "part-1.parquet", new_items.slice(0, 1))
    with pytest.raises(ValueError, match=r"row 0: .*row already"):
        items_of(data)
    hashed = prepared(write_raw_dataset(tmp_path / "hash", item="{kind: hash}"))
    rows = HashVocabulary(8).rows_of(pa.array(list(ITEM_ROWS)))
    assert len(np.unique(rows)) < len(ITEM_ROWS)
    with pytest.raises(ValueError, match="item's hash"):
        items_of(hashed)


def written_dataset(folder: Path) -> tuple[Path, Schema]:
    """A dataset without exact maps, and its schema once the training files were opened."""
    data = write_raw_dataset(folder, "{kind: bounded}", "{kind: hash}", "{kind: hash}")
    schema = load_schema(Location.of(data))
    ParquetRows.of_split(Location.of(data), "train", schema)
    return data, schema


@pytest.mark.parametrize("column", ["user", "friends", "words"])
def test_a_split_with_ids_of_another_type_is_refused(tmp_path: Path, column: str) -> None:
    data, schema = written_dataset(tmp_path / "data")
    values = [1] if column == "user" else [[1]]
    write_parquet(data / "test" / "part-0.parquet", pa.table({**TEST, column: values}))
    with pytest.raises(ValueError, match=rf"test/part-0.parquet: column '{column}' .*integer"):
        ParquetRows.of_split(Location.of(data), "test", schema)


def test_items_with_ids_of_another_type_than_the_impressions_are_refused(tmp_path: Path) -> None:
    data, schema = written_dataset(tmp_path / "data")
    names = {**ITEMS, "item": [str(item) for item in ITEMS["item"]]}
    write_parquet(data / "items" / "part-0.parquet", pa.table(names))
    with pytest.raises(ValueError, match=r"items/part-0.parquet: column 'item' .*string"):
        ItemTable(Location.of(data), schema)
