"""Any Parquet writer's types are read alike, in order or shuffled, whole or in shares."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys.data.parquet.rows import ParquetRows
from recsys.data.parquet.values import ROW_POSITION
from recsys.storage.location import Location
from tests.datasets import write_dataset
from tests.recsys.data.parquet.four_rows import open_rows, read_all, schema_of, table_of


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset whose train split a test writes itself."""
    return write_dataset(tmp_path / "data", num_rows={})


def test_labels_may_lack_where_none_are_wanted(dataset: Path) -> None:
    table = table_of().drop_columns(["liked"])
    with pytest.raises(ValueError, match="column 'liked' is missing"):
        open_rows(dataset, table)
    file = Location.of(dataset / "train" / "part-0.parquet")
    rows = ParquetRows([file], schema_of(dataset), with_labels=False)
    assert "liked" not in read_all(rows)


def test_lists_of_one_size_keep_their_values_and_nulls(dataset: Path) -> None:
    genres = pa.array([[0, 1], None, [2, 3], [4, 0]], pa.list_(pa.int32(), 2))
    rows = open_rows(dataset, table_of(genres=genres), row_group_size=3)
    assert read_all(rows)["genres"] == [[0, 1], None, [2, 3], [4, 0]]


def test_a_shuffle_keeps_each_row_whole_and_differs_by_seed_and_epoch(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, {"train": 60})
    rows = ParquetRows.of_split(Location.of(root), "train", schema_of(root))
    straight = {row[ROW_POSITION]: row for table in rows.read(0, 60) for row in table.to_pylist()}

    def order(seed: int, epoch: int) -> list[int]:
        read = [row for table in rows.read(0, 60, (seed, epoch)) for row in table.to_pylist()]
        assert all(row == straight[row[ROW_POSITION]] for row in read)
        return [row[ROW_POSITION] for row in read]

    first = order(0, 0)
    assert sorted(first) == list(range(60))
    assert order(0, 0) == first
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    # Rows of different row groups are mixed, not only the groups put in another order.
    neighbours = np.abs(np.diff(first)) == 1
    assert neighbours.mean() < 0.2


def test_hidden_files_and_files_of_other_endings_are_no_data(dataset: Path) -> None:
    for name in (".part-9.parquet", "_part-9.parquet", "_SUCCESS", "notes.txt"):
        (dataset / "train" / name).parent.mkdir(exist_ok=True)
        (dataset / "train" / name).write_text("not Parquet")
    assert open_rows(dataset, table_of()).num_rows == 4


def test_folders_may_have_names_that_look_like_patterns(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data [v1] *", {"train": 5})
    assert ParquetRows.of_split(Location.of(root), "train", schema_of(root)).num_rows == 5
