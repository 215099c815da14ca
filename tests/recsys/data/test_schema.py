"""A schema: what is refused in it, and values that stand for null."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from torch import nn

from recsys.data.events.prepare import prepare_events
from recsys.data.parquet.rows import ParquetRows
from recsys.data.prepare import fit_transforms
from recsys.data.schema import Schema, load_schema, parse_schema
from recsys.data.schema_columns import MODULE_ATTRIBUTES
from recsys.serving.requests import RequestReader
from recsys.storage.location import Location
from tests.datasets import write_parquet
from tests.recsys.data.events.test_events_null_ids import write

VALID = """\
target_item: item
group: user
columns:
  user: {kind: id, num_embeddings: 10}
  item: {kind: id, num_embeddings: 30}
  history: {kind: sequence, shares: item, parallel: [history_liked]}
  liked: {kind: label}
"""


def load(folder: Path, text: str) -> Schema:
    (folder / "schema.yaml").write_text(text)
    return load_schema(Location.of(folder))


def test_an_empty_list_or_mapping_may_be_left_open(tmp_path: Path) -> None:
    text = VALID.replace("[history_liked]", "") + "items:\n  id: item\n  columns:\n"
    schema = load(tmp_path, text)
    assert schema.parallel == []
    assert schema.items is not None and schema.items.columns == {}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("shares: item,", "num_embeddings: 30,", "'history'.*`shares: item`"),
        ("kind: id, num_embeddings: 30", "kind: id, shares: user", "'item' .*num_embeddings"),
        (
            "num_embeddings: 10",
            "num_embeddings: 10, vocabulary: {kind: hash, num_hashes: 65}",
            "column 'user': num_hashes is 65",
        ),
        ("num_embeddings: 10", "num_embeddings: 1, vocabulary: {kind: exact}", "'user'.* is 1"),
        ("shares: item,", "shares: item, vocabulary: {kind: hash},", "shares 'item' .*vocabulary"),
        ("num_embeddings: 10", "num_embeddings: 10, parallel: [x]", "'user': .*parallel lists"),
        ("[history_liked]", "[liked]", "'liked' of kind"),
        ("[history_liked]", "[gap, gap]", "parallel list 'gap'"),
        ("[history_liked]", "[__row_position]", "'__row_position'.*rename"),
        ("  user:", "  type: {kind: id, num_embeddings: 3}\n  user:", "'type'.*torch.*'type_id'"),
        ("  user:", "  a.b: {kind: ids, num_embeddings: 3}\n  user:", "'a.b'.*dot"),
        (VALID, "", "a mapping"),
        ("  liked:", "  no:", "line .: key no .*bool"),
        ("num_embeddings: 10", f"num_embeddings: {2**70}", f"'user': num_embeddings is {2**70}"),
        (
            "{kind: label}",
            "{kind: label}\nfeatures: [{by: [user], columns: [age], max_age: {age: soon}}]",
            "'soon' is no duration",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_the_file(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in VALID
    load(tmp_path, VALID)
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path, VALID.replace(old, new))
    assert str(raised.value).startswith(f"{tmp_path}/schema.yaml: ")


def test_all_public_attributes_of_the_module_that_keeps_tables_are_known() -> None:
    public = {name for name in dir(nn.ModuleDict()) if not name.startswith("_")}
    assert public - MODULE_ATTRIBUTES == set()


COLUMNS: dict[str, Any] = {
    "user": {"kind": "id", "num_embeddings": 9, "fill": 8},
    "item": {"kind": "id", "num_embeddings": 9},
    "past": {"kind": "sequence", "shares": "item", "parallel": ["stars"], "fill": {"stars": 2}},
    "price": {"kind": "dense", "fill": 1.5},
    "log_cost": {"kind": "dense", "column": "cost", "transform": [{"fill": 3}, "log1p"]},
    "size": {"kind": "dense", "fill": 4, "transform": ["standardize"]},
    "town": {"kind": "id", "num_embeddings": 5, "vocabulary": {"kind": "hash"}, "fill": "none"},
    "liked": {"kind": "label"},
}
ROWS: dict[str, list[Any]] = {
    "user": [1, None, 3],
    "item": [1, 2, 3],
    "past": [[1], [], [2, 3]],
    "stars": [[None], [], [5, float("nan")]],
    "price": [None, 2, float("nan")],
    "cost": [None, 2.0, 5.0],
    "size": [None, 2.0, 5.0],
    "town": ["Rom", None, None],
    "liked": [0.0, 1.0, 0.0],
}
FILLED: dict[str, list[Any]] = ROWS | {
    "user": [1, 8, 3],
    "stars": [[2], [], [5, 2]],
    "price": [1.5, 2, 1.5],
    "cost": [3.0, 2.0, 5.0],
    "size": [4.0, 2.0, 5.0],
    "town": ["Rom", "none", "none"],
}


def dataset(folder: Path, rows: dict[str, list[Any]]) -> tuple[Schema, dict[str, list[Any]]]:
    """A fitted dataset of rows, and what training reads of them."""
    content = {"target_item": "item", "group": "user", "columns": COLUMNS}
    write_parquet(folder / "train" / "part.parquet", pa.table(rows))
    (folder / "schema.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    fit_transforms(Location.of(folder))
    schema = load_schema(Location.of(folder))
    read = ParquetRows.of_split(Location.of(folder), "train", schema)
    return schema, next(read.read(0, read.num_rows)).to_pydict()


def test_rows_with_nulls_are_read_as_rows_with_the_fills(tmp_path: Path) -> None:
    _, read = dataset(tmp_path / "nulls", ROWS)
    assert read == dataset(tmp_path / "filled", FILLED)[1]
    assert read["price"] == [1.5, 2, 1.5] and read["stars"] == [[2], [], [5, 2]]


def test_a_request_with_nulls_has_the_numbers_of_the_row(tmp_path: Path) -> None:
    schema, rows = dataset(tmp_path, ROWS)
    reader = RequestReader(schema, ["user", "town"], {})
    for number in range(3):
        row = {name: values[number] for name, values in ROWS.items()}
        history = {name: row.pop(name) for name in ("past", "stars")}
        request = reader(row, history, [row.pop("item")])
        for name in ("price", "log_cost", "size"):
            assert request.dense[name] == np.float32(rows[name][number])
        for name in ("user", "town"):
            assert request.pooled[name].rows == rows[name][number]
        assert request.histories[0].numbers[:, 0].tolist() == rows["stars"][number]


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("price", {"fill": "none"}, "'price': fill is the text 'none'; write a number"),
        ("liked", {"fill": 0}, "'liked': fill of kind label has no effect"),
        ("past", {"fill": {"star": 0}}, r"'past': fill of a sequence maps .*\['stars'\]"),
        ("log_cost", {"fill": 0}, "'log_cost': fill is of a column .*the step fill"),
    ],
)
def test_a_fill_that_cannot_be_used_is_refused(
    name: str, change: dict[str, Any], problem: str
) -> None:
    columns = COLUMNS | {name: COLUMNS[name] | change}
    with pytest.raises(ValueError, match=problem):
        parse_schema({"target_item": "item", "group": "user", "columns": columns}, "schema.yaml")


def test_a_prepared_schema_has_the_fills_of_the_settings(tmp_path: Path) -> None:
    def with_fills(log: dict[str, Any], items: dict[str, Any], content: dict[str, Any]) -> None:
        items["cost"] = [None, 1.0, 2.0, 3.0, 4.0, 5.0]
        content["items"]["columns"] = {
            "brand": {"kind": "id", "fill": 7},
            "cost": {"kind": "dense", "fill": 2.5},
        }
        transform = {"column": "cost", "scale": 4, "fill": -1}
        content["histories"]["past"]["parallel"] = {"past_cost": transform, "past_age": "age"}
        content["counts"] = {"views": {"of": "item"}}
        content["transforms"] = {"cost": {"kind": "dense", "transform": ["log1p"]}}

    prepare_events(write(tmp_path, with_fills), tmp_path / "out")
    schema = load_schema(Location.of(tmp_path / "out"))
    assert schema.fills == {"brand": 7, "cost": 2.5, "views": 0.0, "past_cost": -0.25}
