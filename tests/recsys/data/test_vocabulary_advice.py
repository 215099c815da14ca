"""Advice on ids that a map lacks: the command that adds them, where it can."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from recsys.checkpoint.run_schema import load_run_schema, write_run_schema
from recsys.data.filesystem import Location
from recsys.data.items.item_table import ItemTable
from recsys.data.prepare_vocabulary import prepare_vocabularies
from recsys.data.schema import load_schema
from recsys.diagnostics.dataset.findings import find
from recsys.diagnostics.dataset.summary import summarize_dataset
from tests.datasets import write_parquet
from tests.recsys.data.raw_ids import ITEMS, TEST, TRAIN, write_raw_dataset

COMMAND = "run `recsys prepare vocabulary --data {data}`"


def prepared(folder: Path) -> Path:
    """A dataset whose map of items has room for 3 more ids, and that of users for 1."""
    data = write_raw_dataset(folder)
    write_parquet(data / "valid" / "part-0.parquet", pa.table(TEST))
    prepare_vocabularies(str(data))
    return data


def add_items(data: Path, number: int) -> str:
    """Write new items, and return the message about the first of them."""
    more = {"item": [*ITEMS["item"], *range(100, 100 + number)], "text": ["x"] * (4 + number)}
    write_parquet(data / "items" / "part-0.parquet", pa.table(more))
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


def test_of_a_full_map_more_rows_are_advised_first(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    add_items(data, 3)
    prepare_vocabularies(str(data))
    write_parquet(
        data / "items" / "part-0.parquet", pa.table({"item": [200, -7], "text": ["x", "y"]})
    )
    root = Location.of(data)
    with pytest.raises(ValueError, match=r"raise num_embeddings of 'item' in schema\.yaml"):
        ItemTable(root, load_schema(root))


def test_a_run_without_its_map_is_not_advised_to_prepare_one(tmp_path: Path) -> None:
    data, run = prepared(tmp_path / "data"), tmp_path / "run"
    root = Location.of(data)
    schema = load_schema(root)
    ItemTable(root, schema)  # tells the type of ids
    run.mkdir()
    write_run_schema(run, schema)
    with pytest.raises(
        ValueError, match=r"run/vocabulary/user\.parquet: .*bring it back"
    ) as caught:
        load_run_schema(run)
    assert "prepare vocabulary" not in str(caught.value)


def test_findings_on_unknown_ids_say_what_helps(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    names = {**TRAIN, "user": ["new", None, "new"], "words": [["x"], ["new"], ["newer"]]}
    write_parquet(data / "train" / "part-0.parquet", pa.table(names))
    write_parquet(data / "test" / "part-0.parquet", pa.table({**TEST, "user": ["newest"]}))
    fixes = {
        finding.what.split("'")[1] + of: finding.fix
        for finding in find(summarize_dataset(str(data)))
        for of in ("train", "test")
        if f"of {of} are null or unknown" in finding.what
    }
    command = COMMAND.format(data=data)
    assert fixes["usertrain"] == f"fill nulls; for ids that are not rare, {command}"
    assert fixes["wordstrain"].endswith(command)
    assert "prepare vocabulary" not in fixes["usertest"]
