"""`recsys prepare vocabulary`: every id of a dataset in a map that later data only extends."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.checkpoint.run_folder import check_vocabularies, keep_vocabularies
from recsys.cli import main
from recsys.data.prepare import prepare_vocabularies
from recsys.data.schema import load_schema
from recsys.storage.location import Location
from tests.datasets import write_parquet
from tests.recsys.data.raw_ids import (
    ITEM_ROWS,
    TRAIN,
    USER_ROWS,
    WORD_ROWS,
    write_raw_dataset,
)

HASH = "{kind: hash}"


def map_of(data: Path, table: str) -> dict[str | int, int]:
    columns = pq.read_table(data / "vocabulary" / f"{table}.parquet").to_pydict()
    return dict(zip(columns["id"], columns["row"], strict=True))


def test_maps_hold_the_ids_of_all_splits_and_of_the_items(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_raw_dataset(tmp_path / "data")
    assert main(["prepare", "vocabulary", "--data", str(data)]) == 0
    assert map_of(data, "user") == USER_ROWS
    assert map_of(data, "item") == ITEM_ROWS
    assert map_of(data, "words") == WORD_ROWS
    assert capsys.readouterr().out.splitlines() == [
        f"{data}/vocabulary/user.parquet: 4 ids, 4 of them new; room for 1 more",
        f"{data}/vocabulary/item.parquet: 4 ids, 4 of them new; room for 3 more",
        f"{data}/vocabulary/words.parquet: 3 ids, 3 of them new; room for 5 more",
    ]
    assert sorted(path.name for path in (data / "vocabulary").iterdir()) == [
        "item.parquet",
        "user.parquet",
        "words.parquet",
    ]


def test_items_that_nobody_saw_are_in_the_map(tmp_path: Path) -> None:
    data = write_raw_dataset(tmp_path / "data")
    items = pa.table({"item": [99, -7], "text": ["new", "old"]})
    write_parquet(data / "items" / "part-1.parquet", items)
    prepare_vocabularies(str(data))
    assert map_of(data, "item") == {**ITEM_ROWS, 99: 4}


def test_later_data_extends_the_maps_and_moves_no_row(tmp_path: Path) -> None:
    data = write_raw_dataset(tmp_path / "data", words=HASH)
    prepare_vocabularies(str(data))
    later_rows = pa.table({**TRAIN, "user": ["zoe", "joe", "ann"]})
    write_parquet(data / "train" / "part--1.parquet", later_rows)  # read before the earlier part
    user, item = prepare_vocabularies(str(data))
    assert map_of(data, "user") == {**USER_ROWS, "joe": 4}
    assert (user.num_new, item.num_new) == (1, 0)


def test_a_dataset_at_a_url_is_prepared_there(tmp_path: Path) -> None:
    write_raw_dataset(tmp_path / "data")
    root = Location.of("memory://prepared")
    root.filesystem.put(f"{tmp_path}/data", root.path, recursive=True)
    prepare_vocabularies("memory://prepared")
    assert len(load_schema(root).vocabularies) == 3


def test_an_unusable_file_leaves_all_maps_as_they_were(tmp_path: Path) -> None:
    data = write_raw_dataset(tmp_path / "data")
    prepare_vocabularies(str(data))
    later_rows = pa.table({**TRAIN, "user": ["a", "b", "c"], "item": ["5", "6", "7"]})
    write_parquet(data / "train" / "part-1.parquet", later_rows)
    with pytest.raises(ValueError, match=r"part-1.parquet: column 'item': the map holds integers"):
        prepare_vocabularies(str(data))
    assert (map_of(data, "user"), map_of(data, "item")) == (USER_ROWS, ITEM_ROWS)


def test_a_table_that_is_too_small_for_its_ids_grows_and_schema_yaml_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_raw_dataset(tmp_path / "data")
    prepare_vocabularies(str(data))
    later_rows = pa.table({**TRAIN, "user": ["a", "b", "c"], "item": [5, 6, 7]})
    write_parquet(data / "train" / "part-1.parquet", later_rows)
    text = (data / "schema.yaml").read_text()
    assert main(["prepare", "vocabulary", "--data", str(data)]) == 0
    user, item, _ = capsys.readouterr().out.splitlines()
    ids = "7 ids, 3 of them new"
    assert user == (
        f"{data}/vocabulary/user.parquet: {ids}; its table grows from 6 to 9 rows; room for 1 more"
    )
    assert item == f"{data}/vocabulary/item.parquet: {ids}; room for 0 more"
    schema = load_schema(Location.of(data))
    assert (schema.limit("user"), schema.limit("item"), schema.grown) == (9, 8, {"user": 6})
    assert schema.vocabularies["user"].rows_of(pa.array(["a", "zoe", "?"])).tolist() == [4, 3, 8]
    assert (data / "schema.yaml").read_text() == text


def job_on(data: Path) -> Any:
    """As much of a job, of one rank, as looks after the maps of a run."""
    root, ranks = Location.of(data), SimpleNamespace(is_first=True, raise_on_all_ranks=nullcontext)
    return SimpleNamespace(root=root, schema=load_schema(root), ranks=ranks)


def test_a_run_goes_on_with_an_extended_map_and_with_no_other(tmp_path: Path) -> None:
    data, run = write_raw_dataset(tmp_path / "data"), tmp_path / "run"
    prepare_vocabularies(str(data))
    keep_vocabularies(run, job_on(data))
    write_parquet(
        data / "train" / "part--1.parquet", pa.table({**TRAIN, "user": ["joe", "ann", "bob"]})
    )
    prepare_vocabularies(str(data))
    check_vocabularies(run, job_on(data))
    (data / "vocabulary" / "user.parquet").unlink()
    prepare_vocabularies(str(data))  # joe is first now
    with pytest.raises(ValueError, match=r"user.parquet: .*`recsys prepare "):
        check_vocabularies(run, job_on(data))
