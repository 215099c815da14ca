"""Null is the unknown id of a column with a vocabulary, in rows of files and in lists."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from embeddings.vocabulary.fixed import integer_ids
from recsys.data.batch_builder import BatchBuilder
from recsys.data.parquet.rows import ParquetRows
from recsys.data.prepare import prepare_vocabularies
from recsys.data.schema import load_schema
from recsys.data.vocabularies import BoundedVocabularies, UnknownIds
from recsys.storage.location import Location
from tests.datasets import write_parquet
from tests.ranks import run_on_ranks
from tests.recsys.data.raw_ids import TRAIN, write_raw_dataset
from tests.recsys.data.test_vocabularies import BOUNDED, POOLED, lists_of

NULLS: dict[str, list[Any]] = {
    **TRAIN,
    "user": ["ann", None, None],
    "friends": [[None, "bob"], [], None],
    "history": [[], [None], [2**62, None]],
    "words": [["x", None], None, [None]],
}


def write(folder: Path, kinds: dict[str, str], **columns: Any) -> Path:
    data = write_raw_dataset(folder, **kinds)
    write_parquet(data / "train" / "part-0.parquet", pa.table({**NULLS, **columns}))
    if not kinds:
        prepare_vocabularies(str(data))
    return data


def read(data: Path) -> tuple[pa.Table, Any]:
    root = Location.of(data)
    rows = ParquetRows.of_split(root, "train", load_schema(root))
    return next(rows.read(0, rows.num_rows)), rows.schema


def test_null_has_the_row_of_unknown_ids_of_an_exact_map(tmp_path: Path) -> None:
    table, schema = read(write(tmp_path, {}))
    ann, bob, unknown = 0, 1, 5  # the last of 6 rows
    assert table["user"].to_pylist() == [ann, unknown, unknown]
    assert table["friends"].to_pylist() == [[unknown, bob], [], []]
    assert table["history"].to_pylist() == [[], [7], [1, 7]]
    batch = BatchBuilder(schema, POOLED)(table)
    counts = UnknownIds(schema)
    counts.add(batch)
    totals = counts.totals()
    assert totals["user"] == {"ids": 3, "unknown": 2}
    assert totals["history"] == {"ids": 3, "unknown": 2}


def test_null_is_an_id_of_its_own_of_a_hash(tmp_path: Path) -> None:
    kinds = dict.fromkeys(("user", "item", "words"), "{kind: hash}")
    kinds["user"] = "{kind: hash, num_hashes: 2}"
    table, _ = read(write(tmp_path, kinds))
    users = table["user"].to_pylist()
    assert users[1] == users[2]
    assert [len(rows) for rows in users] == [2, 2, 2]
    assert table["friends"].to_pylist()[0][:2] == users[1]
    assert table["words"].to_pylist()[0][1:] == table["words"].to_pylist()[2]


@pytest.mark.parametrize("kinds", [{}, dict.fromkeys(("user", "item", "words"), "{kind: hash}")])
def test_views_of_text_are_read_as_texts(tmp_path: Path, kinds: dict[str, str]) -> None:
    """Arrow can filter and take no views."""
    view = pa.string_view()
    columns: dict[str, Any] = {"user": pa.array(NULLS["user"], view)}
    columns |= {name: pa.array(NULLS[name], pa.list_(view)) for name in ("friends", "words")}
    expected, _ = read(write(tmp_path / "texts", kinds))
    assert read(write(tmp_path / "views", kinds, **columns))[0].equals(expected)


def map_nulls(rank: int, world_size: int, folder: str) -> tuple[list[Any], list[Any], int]:
    """The rows of users and friends in a step that admits every id, and how many got a row."""
    table, schema = read(Path(folder))
    batch = BatchBuilder(schema, POOLED)(table)
    group = torch.distributed.group.WORLD if world_size > 1 else None
    vocabularies = BoundedVocabularies(schema, POOLED, group)
    vocabularies.map_batch(batch, step=0, training=True)
    num_known = vocabularies.counts()["user"].known
    features = batch.sparse_features
    return lists_of(features, "user"), lists_of(features, "friends"), num_known


@pytest.mark.parametrize("ranks", [1, 2])
def test_null_never_gets_a_row_of_a_bounded_vocabulary(tmp_path: Path, ranks: int) -> None:
    data = str(write(tmp_path, dict.fromkeys(("user", "item", "words"), BOUNDED)))
    results = [map_nulls(0, 1, data)] if ranks == 1 else run_on_ranks(map_nulls, ranks, data)
    for users, friends, num_known in results:
        assert users[1:] == [[5], [5]]
        assert friends[0][0] == 5
        assert friends[0][1] != 5
        assert num_known == 2  # ann and bob


def test_a_row_without_a_user_is_a_group_of_its_own(tmp_path: Path) -> None:
    table, schema = read(write(tmp_path, {}))
    groups = BatchBuilder(schema, POOLED)(table).rows.groups.tolist()
    assert groups[0] == integer_ids(pa.array(["ann"]))[0]
    assert len(set(groups)) == 3


@pytest.mark.parametrize(
    ("column", "values", "texts"),
    [
        ("item", [-7, None, 2**62], ["'item', row 1: null", "ranks an item"]),
        ("item", [None, None, None], ["'item'", "null"]),
        ("history_liked", [[], [None], [0.0, 1.0]], ["'history_liked', row 1: null"]),
    ],
)
def test_null_is_refused_where_it_is_no_id(
    tmp_path: Path, column: str, values: list[Any], texts: list[str]
) -> None:
    data = write(tmp_path, dict.fromkeys(("user", "item", "words"), "{kind: hash}"))
    write_parquet(data / "train" / "part-0.parquet", pa.table({**NULLS, column: values}))
    with pytest.raises(ValueError, match=r"train/part-0\.parquet") as caught:
        read(data)
    assert all(text in str(caught.value) for text in texts)


def test_nulls_and_empty_lists_need_no_type(tmp_path: Path) -> None:
    """pyarrow gives such columns the type null."""
    empty: dict[str, list[Any]] = {"user": [None] * 3, "friends": [[], None, []]}
    empty |= {"words": [None] * 3, "history": [[]] * 3, "history_liked": [[]] * 3}
    table, _ = read(write(tmp_path, {}, **empty))
    assert table["user"].to_pylist() == [5, 5, 5]
    for name in ("friends", "words", "history", "history_liked"):
        assert table[name].to_pylist() == [[], [], []]
