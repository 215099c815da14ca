"""Null ids of logs and tables are unknown ids; where ids are rows, what is no row is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.data.events.prepare import prepare_events
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.storage.location import Location

START, ROWS, ITEMS = 1_790_000_000, 60, 7
Change = Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], None]


def write(folder: Path, change: Change | None = None, kind: str = "exact") -> Path:
    """A log of users who take items in turn, and a table that says nothing of items 0 and 1."""
    log: dict[str, Any] = {
        "user": [number % 6 for number in range(ROWS)],
        "item": [number % ITEMS for number in range(ROWS)],
        "time": [START + 3600 * number for number in range(ROWS)],
        "liked": [float(number % 2) for number in range(ROWS)],
    }
    items: dict[str, Any] = {
        "id": list(range(1, ITEMS)),
        "brand": pa.array([None, 5, 4, 5, 4, -1], pa.int64()),
        "tags": [["x", None], ["", "y"], None, [], ["y"], ["x"]],
    }
    content: dict[str, Any] = {
        "events": {"view": {"path": "log.parquet", "columns": ["liked"]}},
        "items": {"path": "items.parquet", "columns": {"brand": "id", "tags": "ids"}},
        "labels": {"liked_it": {"column": "liked"}},
        "histories": {"past": {"length": 3, "parallel": {"past_brand": "brand"}}},
        "vocabulary": {"kind": kind},
    }
    if change is not None:
        change(log, items, content)
    pq.write_table(pa.table(log), folder / "log.parquet")
    pq.write_table(pa.table(items), folder / "items.parquet")
    (folder / "events.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "events.yaml"


def brand_of(item: int) -> int | None:
    return [None, None, 5, 4, 5, 4, -1][item]


def check_nulls(data: Path) -> None:
    """Compare the ids of items and those beside past items with the table."""
    table = pq.read_table(data / "train").to_pylist()
    for row in table:
        assert row["brand"] == brand_of(row["item"])
        assert row["past_brand"] == list(map(brand_of, row["past"]))
    assert {None, -1, 5} <= {brand for row in table for brand in row["past_brand"]}
    tags = {row["item"]: row["tags"] for row in table}
    assert (tags[0], tags[1], tags[2], tags[3]) == (None, ["x", None], [None, "y"], None)
    maps = {
        name: pq.read_table(data / "vocabulary" / f"{name}.parquet")["id"].to_pylist()
        for name in ("brand", "past_brand", "tags")
    }
    assert maps == {"brand": [-1, 4, 5], "past_brand": [-1, 4, 5], "tags": ["x", "y"]}


def test_null_ids_stay_null_and_are_read_as_unknown(tmp_path: Path) -> None:
    prepare_events(write(tmp_path), tmp_path / "out")
    check_nulls(tmp_path / "out")
    root = Location.of(tmp_path / "out")
    rows = ParquetRows.of_split(root, "train", load_schema(root))
    read = next(rows.read(0, rows.num_rows)).to_pylist()
    unknown = 3  # after three known ids
    first = next(row for row in read if row["item"] == 0)
    assert (first["brand"], first["tags"]) == (unknown, [])
    assert any(unknown in row["past_brand"] for row in read)


def use_row_ids(log: dict[str, Any], items: dict[str, Any], content: dict[str, Any]) -> None:
    """Give every item a brand and tags that are rows."""
    items |= {"id": list(range(ITEMS)), "brand": [0, 1, 2, 0, 1, 2, 9]}
    items["tags"] = [[number] for number in range(ITEMS)]


def only_before(log: dict[str, Any], items: dict[str, Any], content: dict[str, Any]) -> None:
    """Show an item's brand beside events alone: no sample is of the item."""
    use_row_ids(log, items, content)
    log["kind"] = ["view" if item < 6 else "buy" for item in log["item"]]
    content["events"]["view"]["action"] = "kind"
    content["rows"] = "view"


@pytest.mark.parametrize("change", [use_row_ids, only_before])
def test_a_table_has_the_rows_of_all_ids_of_its_column(tmp_path: Path, change: Change) -> None:
    prepare_events(write(tmp_path, change, "rows"), tmp_path / "out")
    schema = load_schema(Location.of(tmp_path / "out"))
    assert schema.columns["past_brand"].num_embeddings == 10
    for split in ("train", "valid", "test"):
        rows = ParquetRows.of_split(Location.of(tmp_path / "out"), split, schema)
        list(rows.read(0, rows.num_rows))


def test_an_id_that_stands_beside_events_alone_has_a_row_of_its_own(tmp_path: Path) -> None:
    prepare_events(write(tmp_path, only_before), tmp_path / "out")
    for name in ("brand", "past_brand"):
        vocabulary = pq.read_table(tmp_path / "out" / "vocabulary" / f"{name}.parquet")
        assert vocabulary["id"].to_pylist() == [0, 1, 2, 9]


def without_brand(log: dict[str, Any], items: dict[str, Any], content: dict[str, Any]) -> None:
    only_before(log, items, content)
    items["brand"] = pa.array([0, 1, 2, 0, 1, 2, None])


def test_a_null_where_ids_are_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kind is rows, but 'brand' has null .*exact"):
        prepare_events(write(tmp_path, without_brand, "rows"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
