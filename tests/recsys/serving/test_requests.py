"""Requests are read by the schema: same rows as training reads, and words for what is wrong."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from embeddings import BoundedVocabulary, ExactVocabulary, HashVocabulary
from embeddings.vocabulary.fixed import NULL_ID
from recsys.data.schema import Schema, parse_schema
from recsys.data.schema_columns import Column, IdType, VocabularySettings
from recsys.data.transforms.columns import check_types
from recsys.serving.requests import RequestReader, RequestRows

USER = {"user": 3, "tags": [1, 2], "age": 0.5, "shop": 9, "query": ["a", "b"]}
HISTORY = {"seen": ["ann", "eve"], "liked": [1.0, 0.0]}


def reader() -> RequestReader:
    schema = Schema(
        "item",
        "user",
        {
            "user": Column("id", num_embeddings=10),
            "item": Column("id", num_embeddings=4, vocabulary=VocabularySettings("exact")),
            "seen": Column("sequence", shares="item", parallel=["liked"]),
            "tags": Column("ids", num_embeddings=5),
            "query": Column("ids", num_embeddings=7, vocabulary=VocabularySettings("hash", 2)),
            "shop": Column("id", num_embeddings=6, vocabulary=VocabularySettings("bounded")),
            "age": Column("dense"),
            "bought": Column("label"),
        },
    )
    exact = ExactVocabulary(4)
    exact.extend([pa.array(["ann", "bob", "eve"])])
    schema.vocabularies.update(item=exact, query=HashVocabulary(7, 2))
    schema.id_types["query"] = IdType("string", "train")
    bounded = BoundedVocabulary(6)
    bounded.rows_of(torch.tensor([9]), step=0, training=True)
    return RequestReader(schema, ["user", "tags", "query", "shop"], {"shop": bounded})


def test_null_is_the_unknown_id_of_a_column_with_a_vocabulary() -> None:
    user, history = USER | {"shop": None, "query": ["a", None]}, HISTORY | {"seen": [None, "eve"]}
    rows: RequestRows = reader()(user, history, ["eve"])
    assert rows.histories[0].ids["seen"].tolist() == [3, 2]
    assert rows.pooled["shop"].rows.tolist() == [5]
    null_row = HashVocabulary(7, 2).rows_of(pa.array([NULL_ID]))[0].tolist()
    assert rows.pooled["query"].rows.tolist()[2:] == null_row
    assert reader()(user | {"query": [None]}, [], ["eve"]).pooled["query"].rows.tolist() == null_row
    for changed in ({"user": None}, {"tags": [None]}, {"age": None}):
        with pytest.raises(ValueError, match=rf"'{next(iter(changed))}'.*null"):
            reader()(USER | changed, [], ["eve"])
    with pytest.raises(ValueError, match=r"'item', value 1: null.* leave it out"):
        reader()(USER, [], ["eve", None])


def test_ids_lists_and_numbers_become_rows_of_tables() -> None:
    rows: RequestRows = reader()(USER, HISTORY, ["eve", "joe"])

    assert rows.target.tolist() == [2, 3]  # an unknown id has the last row
    assert rows.histories[0].ids["seen"].tolist() == [0, 2]
    assert rows.histories[0].numbers.tolist() == [[1.0], [0.0]]
    assert rows.pooled["user"].rows.tolist() == [3]
    assert (rows.pooled["tags"].rows.tolist(), rows.pooled["tags"].lengths.tolist()) == (
        [1, 2],
        [2],
    )
    hashes = HashVocabulary(7, 2).rows_of(pa.array(["a", "b"]))
    assert rows.pooled["query"].rows.tolist() == hashes.flatten().tolist()
    assert rows.pooled["query"].lengths.tolist() == [4]
    assert rows.dense["age"].dtype == np.float32
    assert rows.pooled["shop"].rows[0] != 5  # learned in training


def test_a_type_is_checked_also_after_a_request_of_the_right_one() -> None:
    read = reader()
    read(USER, HISTORY, ["eve"])
    with pytest.raises(ValueError, match="age"):
        read(USER | {"age": "old"}, HISTORY, ["eve"])
    with pytest.raises(ValueError, match="item"):
        read(USER, HISTORY, [7])
    assert read(USER | {"age": 1}, HISTORY, ["eve"]).dense["age"].tolist() == [1.0]


CROSSED = """
target_item: item
group: item
columns:
  item: {kind: id, num_embeddings: 4}
  club: {kind: id, num_embeddings: 99, column: [member, city], transform: [cross, {hash: 99}]}
  low:  {kind: id, num_embeddings: 99, column: club, transform: [{fill: 0}]}
  hour: {kind: id, num_embeddings: 24, column: when, transform: [hour]}
  liked: {kind: label}
"""


def crossed() -> Schema:
    return parse_schema(yaml.safe_load(CROSSED), "schema.yaml")


def test_types_of_a_request_are_not_asked_of_the_next_one() -> None:
    read = RequestReader(crossed(), ["hour"], {})
    for moment in (5 * 3600, "1970-01-01T05:00", 5 * 3600):
        assert read({"when": moment}, [], [1]).pooled["hour"].rows.tolist() == [5]


@pytest.mark.parametrize(
    ("member", "name", "other"), [(True, "boolean", 1), (1, "integer", True), ("a", "string", True)]
)
@pytest.mark.parametrize("column", ["club", "low"])
def test_true_is_not_1_where_columns_are_crossed(
    member: Any, name: str, other: Any, column: str
) -> None:
    schema = crossed()
    kinds = {"member": pa.array([member]).type, "city": pa.string()}
    check_types(schema, [column], kinds.__getitem__, "train")
    assert schema.id_types["member"].name == name
    read = RequestReader(schema, [column], {}, [])
    text = f"{str(member).lower() if member is True else member}\x1fRom"
    expected = HashVocabulary(99).rows_of(pa.array([text]))[0].tolist()
    assert read({"member": member, "city": "Rom"}, [], [1]).pooled[column].rows.tolist() == expected
    with pytest.raises(ValueError, match=rf"user: column 'member' .* train has {name} ids"):
        read({"member": other, "city": "Rom"}, [], [1])


def test_unknown_ids_are_counted_by_column() -> None:
    read = reader()
    user = USER | {"shop": 8}

    rows = read(user, {"seen": ["ann", "joe", "sue"], "liked": [1.0, 0.0, 0.0]}, ["eve", "joe"])

    assert read.unknown_ids(rows) == {"shop": (1, 1), "seen": (3, 2), "item": (2, 1)}
    counts = read.unknown_ids(read(USER, (), ["eve"]))
    assert counts == {"shop": (1, 0), "seen": (0, 0), "item": (1, 0)}


def test_all_items_are_those_of_the_map_up_to_a_limit() -> None:
    assert reader().item_ids(limit=3) == ["ann", "bob", "eve"]
    with pytest.raises(ValueError, match=r"are 3; .* is 2:"):
        reader().item_ids(limit=2)


def test_a_column_may_differ_between_candidates() -> None:
    rows = reader()(USER, (), {"item": ["ann", "bob"], "age": [1.0, 2.0], "tags": [[], [4]]})

    assert rows.dense["age"].tolist() == [1.0, 2.0]
    assert rows.pooled["tags"].lengths.tolist() == [0, 1]
    assert len(rows.histories[0].ids["seen"]) == 0 and rows.histories[0].numbers.shape == (0, 1)


@pytest.mark.parametrize(
    ("user", "history", "candidates", "message"),
    [
        ({"user": 1.5}, (), ["ann"], "user: column 'user' .*double"),
        ({"user": 2**70}, (), ["ann"], "user: column 'user'.*64 bits"),
        ({"tags": 3}, (), ["ann"], "user: column 'tags' .*int64"),
        ({"query": [1]}, (), ["ann"], "user.*'query'"),
        ({}, {"seen": ["ann"], "liked": []}, ["ann"], "history: 'liked' has 0 values for 1"),
        ({}, (), bytearray(b"a"), "candidates: 'item' .*list"),
        ({}, (), [["ann"]], "candidates: column 'item'"),
        ({}, (), {"age": [1.0]}, "candidates: lacks 'item'"),
    ],
)
def test_what_is_wrong_is_named(user: Any, history: Any, candidates: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reader()(USER | user, history, candidates)
