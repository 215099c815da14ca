"""Errors about raw ids: of two types in one table, or absent from a map that a command extends."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.rows import ParquetRows
from recsys.data.prepare_vocabulary import prepare_vocabularies
from recsys.data.schema import Schema, load_schema
from recsys.storage.location import Location
from tests.datasets import write_parquet
from tests.recsys.data.raw_ids import ITEMS, TEST, write_raw_dataset

COMMAND = "run `recsys prepare vocabulary --data {data}`"


def prepared(folder: Path) -> Path:
    """A dataset whose map of items has room for 3 more ids, and that of users for 1."""
    data = write_raw_dataset(folder)
    write_parquet(data / "valid" / "part-0.parquet", pa.table(TEST))
    prepare_vocabularies(str(data))
    return data


def add_items(data: Path, number: int) -> str:
    """Write new items, and return the message about the first of them."""
    items = {"item": [*ITEMS["item"], *range(100, 100 + number)], "text": ["x"] * (4 + number)}
    write_parquet(data / "items" / "part-0.parquet", pa.table(items))
    root = Location.of(data)
    with pytest.raises(ValueError, match=r"id 100 .*'item'") as caught:
        ItemTable(root, load_schema(root))
    return str(caught.value)


def test_an_item_that_a_map_lacks_is_advised_to_be_added(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    message = add_items(data, 3)
    assert f"; {COMMAND.format(data=data)}, or remove" in message
    prepare_vocabularies(str(data))  # the command helps
    ItemTable(Location.of(data), load_schema(Location.of(data)))


def written(folder: Path) -> tuple[Path, Schema]:
    """A dataset without exact maps, and its schema once the training files were opened."""
    data = write_raw_dataset(folder, "{kind: bounded}", "{kind: hash}", "{kind: hash}")
    schema = load_schema(Location.of(data))
    ParquetRows.of_split(Location.of(data), "train", schema)
    return data, schema


@pytest.mark.parametrize("column", ["user", "friends", "words"])
def test_a_split_with_ids_of_another_type_is_refused(tmp_path: Path, column: str) -> None:
    data, schema = written(tmp_path / "data")
    values = [1] if column == "user" else [[1]]
    write_parquet(data / "test" / "part-0.parquet", pa.table({**TEST, column: values}))
    with pytest.raises(ValueError, match=rf"test/part-0.parquet: column '{column}' .*integer"):
        ParquetRows.of_split(Location.of(data), "test", schema)


def test_items_with_ids_of_another_type_than_the_impressions_are_refused(tmp_path: Path) -> None:
    data, schema = written(tmp_path / "data")
    names = {**ITEMS, "item": [str(item) for item in ITEMS["item"]]}
    write_parquet(data / "items" / "part-0.parquet", pa.table(names))
    with pytest.raises(ValueError, match=r"items/part-0.parquet: column 'item' .*string"):
        ItemTable(Location.of(data), schema)
