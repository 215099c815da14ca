"""Every value that cannot be used is named by file, column and row, every file by what it lacks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.data.filesystem import Location
from recsys.data.parquet.rows import ParquetRows
from tests.datasets import write_dataset, write_parquet
from tests.recsys.data.parquet.four_rows import COLUMNS, open_rows, read_all, schema_of, table_of


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset whose train split a test writes itself."""
    return write_dataset(tmp_path / "data", num_rows={})


def replacing(name: str, row: int, value: Any) -> Callable[[], pa.Array]:
    values, kind = COLUMNS[name]
    return lambda: pa.array([*values[:row], value, *values[row + 1 :]], kind)


BAD_VALUES = {
    "null id": ("user", replacing("user", 3, None), "null"),
    "null dense": ("price", replacing("price", 3, None), "null"),
    "null label": ("liked", replacing("liked", 3, None), "null"),
    "null in ids": (
        "genres",
        replacing("genres", 3, [1, None]),
        "null inside",
    ),
    "null in a parallel list": (
        "history_liked",
        replacing("history_liked", 3, [1, None]),
        "null inside",
    ),
    "negative id": (
        "item",
        replacing("item", 3, -1),
        r"id -1 is outside \[0, 30\); raise num_embeddings of 'item'",
    ),
    "id beyond its table": (
        "user",
        replacing("user", 3, 10),
        r"id 10 is outside \[0, 10\); raise num_embeddings of 'user'",
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
    "NaN": ("price", replacing("price", 3, float("nan")), "value nan"),
    "infinity": ("price", replacing("price", 3, float("inf")), "value inf"),
    "double beyond float32": (
        "price",
        lambda: pa.array([0, 0, 0, 1e300], pa.float64()),
        "value inf.*float32",
    ),
    "NaN in a parallel list": (
        "history_liked",
        replacing("history_liked", 3, [1, float("nan")]),
        "value nan",
    ),
    "shorter parallel list": (
        "history_liked",
        replacing("history_liked", 3, [1]),
        r"'history' \(2 items\)",
    ),
    "null parallel list": (
        "history_liked",
        replacing("history_liked", 3, None),
        r"'history' \(2 items\)",
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
    message = f"{file}: column '{name}' .*, expected {expected};"
    with pytest.raises(ValueError, match=message):
        open_rows(dataset, table_of(), table_of(**{name: array}))


@pytest.mark.parametrize("name", COLUMNS)
def test_a_missing_column_is_named_with_those_that_are_there(dataset: Path, name: str) -> None:
    file = dataset / "train" / "part-1.parquet"
    with pytest.raises(ValueError, match=rf"{file}: column '{name}' is missing.*\["):
        open_rows(dataset, table_of(), table_of().drop_columns([name]))


def test_a_split_without_files_is_named(dataset: Path) -> None:
    for split in ("train", "valid"):
        with pytest.raises(ValueError, match=rf"{dataset}/{split}: no \*.parquet files"):
            ParquetRows.of_split(Location.of(dataset), split, schema_of(dataset))
        (dataset / split).mkdir()


def test_a_missing_file_is_named(dataset: Path) -> None:
    with pytest.raises(ValueError, match=f"{dataset}/none.parquet: "):
        ParquetRows([Location.of(dataset / "none.parquet")], schema_of(dataset))


def test_a_file_without_rows_is_named(dataset: Path) -> None:
    with pytest.raises(ValueError, match=r"part-1\.parquet: .*no rows"):
        open_rows(dataset, table_of(), table_of().slice(0, 0))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"a,b\n1,2\n" * 100])
def test_a_file_that_is_not_parquet_is_named(dataset: Path, content: bytes) -> None:
    path = dataset / "train" / "part-1.parquet"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: .*Parquet"):
        open_rows(dataset, table_of())


def test_a_truncated_file_is_named(dataset: Path) -> None:
    path = write_parquet(dataset / "train" / "part-1.parquet", table_of())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{path}: .*Parquet"):
        open_rows(dataset, table_of())


def test_a_file_with_damaged_pages_is_named_with_its_row_group(dataset: Path) -> None:
    rows = open_rows(dataset, table_of(), row_group_size=2)
    path = dataset / "train" / "part-0.parquet"
    with pq.ParquetFile(path) as parquet:
        start = parquet.metadata.row_group(1).column(0).dictionary_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}: row group 1 \(rows from 2\)"):
        read_all(rows)
