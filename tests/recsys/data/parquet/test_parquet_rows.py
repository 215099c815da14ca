"""Any Parquet writer's types are read alike, in order or shuffled, whole or in shares."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.data.filesystem import Location
from recsys.data.item_frequency import count_items
from recsys.data.parquet.rows import ParquetRows
from recsys.data.parquet.values import ROW_POSITION
from tests.datasets import write_dataset
from tests.recsys.data.parquet.four_rows import COLUMNS, open_rows, read_all, schema_of, table_of


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset whose train split a test writes itself."""
    return write_dataset(tmp_path / "data", num_rows={})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("user", pa.int32()),
        ("user", pa.uint8()),
        ("item", pa.uint64()),
        ("history", pa.large_list(pa.int64())),
        ("history", pa.list_(pa.int32())),
        ("genres", pa.large_list(pa.int16())),
        ("history_liked", pa.list_(pa.bool_())),
        ("history_liked", pa.large_list(pa.float64())),
        ("history_liked", pa.list_(pa.int8())),
        ("price", pa.float64()),
        ("price", pa.float16()),
        ("liked", pa.bool_()),
        ("liked", pa.int64()),
    ],
    ids=str,
)
def test_every_number_and_list_type_is_read_as_the_same_values(
    dataset: Path, name: str, kind: pa.DataType
) -> None:
    values = COLUMNS[name][0]
    if kind == pa.float16():
        values = list(np.array(values, np.float16))
    if kind in (pa.bool_(), pa.list_(pa.bool_())):
        values = [list(map(bool, row)) if isinstance(row, list) else bool(row) for row in values]
    rows = open_rows(dataset, table_of(**{name: pa.array(values, kind)}))
    (table,) = rows.read(0, 4)
    assert table.to_pydict() == {
        **{column: expected for column, (expected, _) in COLUMNS.items()},
        ROW_POSITION: [0, 1, 2, 3],
    }
    assert table.schema.field(name).type == COLUMNS[name][1]


def test_fixed_size_lists_are_read_like_others(dataset: Path) -> None:
    history = pa.array([[1, 2], None, [3, 4], [5, 6]], pa.list_(pa.int32(), 2))
    liked = pa.array([[1, 0], None, [0, 1], [1, 1]], pa.list_(pa.float64(), 2))
    read = read_all(open_rows(dataset, table_of(history=history, history_liked=liked)))
    assert read["history"] == [[1, 2], None, [3, 4], [5, 6]]
    assert read["history_liked"] == [[1, 0], None, [0, 1], [1, 1]]


def test_a_whole_number_too_fine_for_float32_is_rounded(dataset: Path) -> None:
    price = pa.array([2**24 + 1, 0, 0, 0], pa.int64())
    assert read_all(open_rows(dataset, table_of(price=price)))["price"][0] == 2.0**24


def test_columns_that_the_schema_does_not_name_are_not_read(dataset: Path) -> None:
    read = read_all(open_rows(dataset, table_of(note=pa.array(list("abcd")))))
    assert set(read) == {*COLUMNS, ROW_POSITION}


def test_labels_may_lack_where_none_are_wanted(dataset: Path) -> None:
    table = table_of().drop_columns(["liked"])
    with pytest.raises(ValueError, match="column 'liked' is missing"):
        open_rows(dataset, table)
    file = Location.of(dataset / "train" / "part-0.parquet")
    rows = ParquetRows([file], schema_of(dataset), with_labels=False)
    assert "liked" not in read_all(rows)


def test_rows_of_all_files_and_row_groups_keep_their_order(dataset: Path) -> None:
    tables = [table_of(), table_of().slice(0, 3), table_of().slice(2)]
    rows = open_rows(dataset, *tables, row_group_size=2)
    assert [group.num_rows for group in rows.row_groups] == [2, 2, 2, 1, 2]
    assert [group.first_row for group in rows.row_groups] == [0, 2, 0, 2, 0]
    assert rows.num_rows == 9
    read = read_all(rows)
    assert read["user"] == [0, 1, 2, 3, 0, 1, 2, 2, 3]
    assert read[ROW_POSITION] == list(range(9))


@pytest.mark.parametrize("num_rows", [1, 5, 9])
def test_a_range_of_places_is_read_alone(dataset: Path, num_rows: int) -> None:
    rows = open_rows(dataset, table_of(), table_of(), table_of(), row_group_size=3)
    for start in range(12 - num_rows + 1):
        tables = list(rows.read(start, start + num_rows))
        positions = np.concatenate([table[ROW_POSITION].to_numpy() for table in tables])
        assert positions.tolist() == list(range(start, start + num_rows))


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


def test_items_are_counted_over_the_shares_of_all_ranks(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, {"train": 47})
    rows = ParquetRows.of_split(Location.of(root), "train", schema_of(root))
    expected = np.bincount(pq.read_table(root / "train")["item"].to_numpy(), minlength=30)
    for world_size in (1, 3):
        parts = [
            count_items(rows, rank, world_size).of(np.arange(30)) for rank in range(world_size)
        ]
        assert sum(parts).tolist() == expected.tolist()  # type: ignore[union-attr]


def test_hidden_files_and_files_of_other_endings_are_no_data(dataset: Path) -> None:
    for name in (".part-9.parquet", "_part-9.parquet", "_SUCCESS", "notes.txt"):
        (dataset / "train" / name).parent.mkdir(exist_ok=True)
        (dataset / "train" / name).write_text("not Parquet")
    assert open_rows(dataset, table_of()).num_rows == 4


def test_folders_may_have_names_that_look_like_patterns(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data [v1] *", {"train": 5})
    assert ParquetRows.of_split(Location.of(root), "train", schema_of(root)).num_rows == 5
