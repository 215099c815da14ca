"""Raw ids of a table are all integers or all strings, as 7 and "7" are two ids."""

from pathlib import Path

import pyarrow as pa
import pytest

from recsys.data.filesystem import Location
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import Schema, load_schema
from tests.datasets import write_parquet
from tests.recsys.data.raw_ids import ITEMS, TEST, write_raw_dataset


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
