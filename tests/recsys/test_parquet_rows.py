"""Any Parquet writer's types are read alike; every value that cannot be used is named by row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.data.filesystem import Location
from recsys.data.parquet_rows import ROW_POSITION, ParquetRows, count_items
from recsys.data.schema import Schema, load_schema
from tests.datasets import write_dataset, write_parquet

COLUMNS: dict[str, tuple[list[Any], pa.DataType]] = {
    "user": ([0, 1, 2, 3], pa.int64()),
    "item": ([5, 6, 7, 8], pa.int64()),
    "history": ([[1, 2], [], [3], [4, 5]], pa.list_(pa.int64())),
    "history_liked": ([[1, 0], [], [1], [0, 0]], pa.list_(pa.float32())),
    "genres": ([[0], [1, 2], [], [3]], pa.list_(pa.int64())),
    "price": ([0.5, 1.5, -2.0, 4.0], pa.float32()),
    "liked": ([1, 0, 1, 0], pa.float32()),
}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset whose train split a test writes itself."""
    return write_dataset(tmp_path / "data", num_rows={})


def schema_of(dataset: Path) -> Schema:
    return load_schema(Location.of(dataset))


def table_of(**replaced: pa.Array) -> pa.Table:
    arrays = {name: pa.array(values, kind) for name, (values, kind) in COLUMNS.items()}
    return pa.table(arrays | replaced)


def open_rows(dataset: Path, *tables: pa.Table, row_group_size: int = 4) -> ParquetRows:
    for index, table in enumerate(tables):
        write_parquet(dataset / "train" / f"part-{index}.parquet", table, row_group_size)
    return ParquetRows.of_split(Location.of(dataset), "train", schema_of(dataset))


def read_all(rows: ParquetRows) -> dict[str, list[Any]]:
    return pa.concat_tables(rows.read(0, rows.num_rows)).to_pydict()


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
        parts = [count_items(rows, rank, world_size) for rank in range(world_size)]
        assert sum(parts).tolist() == expected.tolist()  # type: ignore[union-attr]


def replacing(name: str, row: int, value: Any) -> Callable[[], pa.Array]:
    values, kind = COLUMNS[name]
    return lambda: pa.array([*values[:row], value, *values[row + 1 :]], kind)


BAD_VALUES = {
    "null id": ("user", replacing("user", 3, None), "null; fill it or drop the row"),
    "null dense": ("price", replacing("price", 3, None), "null; fill it or drop the row"),
    "null label": ("liked", replacing("liked", 3, None), "null; fill it or drop the row"),
    "null in ids": (
        "genres",
        replacing("genres", 3, [1, None]),
        "null inside the list; fill it or leave it out",
    ),
    "null in a parallel list": (
        "history_liked",
        replacing("history_liked", 3, [1, None]),
        "null inside the list; fill it or leave it out",
    ),
    "negative id": (
        "item",
        replacing("item", 3, -1),
        r"id -1 is outside \[0, 30\); raise num_embeddings of 'item' in schema.yaml or map",
    ),
    "id beyond its table": (
        "user",
        replacing("user", 3, 10),
        r"id 10 is outside \[0, 10\); raise num_embeddings of 'user' in schema.yaml or map",
    ),
    "unsigned id beyond int64": (
        "user",
        lambda: pa.array([0, 1, 2, 2**63], pa.uint64()),
        rf"id {2**63} is outside \[0, 10\)",
    ),
    "small type with an id beyond its table": (
        "user",
        lambda: pa.array([0, 1, 2, 127], pa.int8()),
        r"id 127 is outside \[0, 10\)",
    ),
    "history id beyond the table it shares": (
        "history",
        replacing("history", 3, [4, 30]),
        r"id 30 is outside \[0, 30\); raise num_embeddings of 'item'",
    ),
    "ids beyond their table": (
        "genres",
        replacing("genres", 3, [0, 1, 5]),
        r"id 5 is outside \[0, 5\); raise num_embeddings of 'genres'",
    ),
    "fixed-size list after a null one": (
        "genres",
        lambda: pa.array([None, [0, 1], None, [2, 9]], pa.list_(pa.int64(), 2)),
        r"id 9 is outside \[0, 5\)",
    ),
    "list after a null one": (
        "genres",
        lambda: pa.array([None, [0, 1], None, [2, 9]], pa.list_(pa.int64())),
        r"id 9 is outside \[0, 5\)",
    ),
    "NaN": ("price", replacing("price", 3, float("nan")), "value nan; write a finite number"),
    "infinity": ("price", replacing("price", 3, float("inf")), "value inf; write a finite number"),
    "double beyond float32": (
        "price",
        lambda: pa.array([0, 0, 0, 1e300], pa.float64()),
        "value inf; write a finite number that fits float32",
    ),
    "NaN in a parallel list": (
        "history_liked",
        replacing("history_liked", 3, [1, float("nan")]),
        "value nan; write a finite number",
    ),
    "shorter parallel list": (
        "history_liked",
        replacing("history_liked", 3, [1]),
        r"the list has another length than 'history' \(2 items\); write one value per item",
    ),
    "null parallel list": (
        "history_liked",
        replacing("history_liked", 3, None),
        r"the list has another length than 'history' \(2 items\); write one value per item",
    ),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_value_that_cannot_be_used_is_named_with_file_column_and_row(
    dataset: Path, case: str
) -> None:
    name, bad, message = BAD_VALUES[case]
    # Two rows per group: the bad row 3 lies in the second group of the second file.
    rows = open_rows(dataset, table_of(), table_of(**{name: bad()}), row_group_size=2)
    file = dataset / "train" / "part-1.parquet"
    with pytest.raises(ValueError, match=f"{file}: column '{name}', row 3: .*{message}"):
        read_all(rows)


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        ("user", pa.array([0.0, 1, 2, 3]), "integer"),
        ("user", pa.array(list("abcd")), "integer"),
        ("user", pa.array([[0]] * 4), "integer"),
        ("item", pa.array([True] * 4), "integer"),
        ("genres", pa.array([0, 1, 2, 3]), "list<integer>"),
        ("genres", pa.array([[0.5]] * 4), "list<integer>"),
        ("history", pa.array([[[0]]] * 4), "list<integer>"),
        ("history_liked", pa.array([["a"]] * 4), "list<float>"),
        ("history_liked", pa.array([1.0] * 4), "list<float>"),
        ("price", pa.array(list("abcd")), "float"),
        ("price", pa.array([[0.5]] * 4), "float"),
        ("liked", pa.array([{"a": 1}] * 4), "float"),
    ],
)
def test_a_column_of_another_type_is_named_when_the_file_is_opened(
    dataset: Path, name: str, array: pa.Array, expected: str
) -> None:
    file = dataset / "train" / "part-1.parquet"
    message = f"{file}: column '{name}' has type .*, expected {expected}; write it with that type"
    with pytest.raises(ValueError, match=message):
        open_rows(dataset, table_of(), table_of(**{name: array}))


@pytest.mark.parametrize("name", COLUMNS)
def test_a_missing_column_is_named_with_those_that_are_there(dataset: Path, name: str) -> None:
    file = dataset / "train" / "part-1.parquet"
    with pytest.raises(ValueError, match=rf"{file}: column '{name}' is missing; the file has \["):
        open_rows(dataset, table_of(), table_of().drop_columns([name]))


def test_a_split_without_files_is_named(dataset: Path) -> None:
    for split in ("train", "valid"):
        with pytest.raises(ValueError, match=rf"{dataset}/{split}: no \*.parquet files"):
            ParquetRows.of_split(Location.of(dataset), split, schema_of(dataset))
        (dataset / split).mkdir()


def test_hidden_files_and_files_of_other_endings_are_no_data(dataset: Path) -> None:
    for name in (".part-9.parquet", "_part-9.parquet", "_SUCCESS", "notes.txt"):
        (dataset / "train" / name).parent.mkdir(exist_ok=True)
        (dataset / "train" / name).write_text("not Parquet")
    (dataset / "train" / "folder.parquet").mkdir()
    assert open_rows(dataset, table_of()).num_rows == 4


def test_folders_may_have_names_that_look_like_patterns(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data [v1] *", {"train": 5})
    assert ParquetRows.of_split(Location.of(root), "train", schema_of(root)).num_rows == 5


def test_a_missing_file_is_named(dataset: Path) -> None:
    with pytest.raises(ValueError, match=f"{dataset}/none.parquet: no such file"):
        ParquetRows([Location.of(dataset / "none.parquet")], schema_of(dataset))


def test_a_file_without_rows_is_named(dataset: Path) -> None:
    with pytest.raises(ValueError, match="part-1.parquet: the file has no rows; remove it"):
        open_rows(dataset, table_of(), table_of().slice(0, 0))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"a,b\n1,2\n" * 100])
def test_a_file_that_is_not_parquet_is_named(dataset: Path, content: bytes) -> None:
    path = dataset / "train" / "part-1.parquet"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: not a readable Parquet file"):
        open_rows(dataset, table_of())


def test_a_truncated_file_is_named(dataset: Path) -> None:
    path = write_parquet(dataset / "train" / "part-1.parquet", table_of())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{path}: not a readable Parquet file"):
        open_rows(dataset, table_of())


def test_a_file_with_damaged_pages_is_named_with_its_row_group(dataset: Path) -> None:
    rows = open_rows(dataset, table_of(), row_group_size=2)
    path = dataset / "train" / "part-0.parquet"
    with pq.ParquetFile(path) as parquet:
        start = parquet.metadata.row_group(1).column(0).dictionary_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}: row group 1 \(rows from 2\) cannot be read"):
        read_all(rows)
