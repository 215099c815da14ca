"""Four impressions with every column, of which tests replace what they are about."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import Schema, load_schema
from recsys.storage.location import Location
from tests.datasets import write_parquet

COLUMNS: dict[str, tuple[list[Any], pa.DataType]] = {
    "user": ([0, 1, 2, 3], pa.int64()),
    "item": ([5, 6, 7, 8], pa.int64()),
    "history": ([[1, 2], [], [3], [4, 5]], pa.list_(pa.int64())),
    "history_liked": ([[1, 0], [], [1], [0, 0]], pa.list_(pa.float32())),
    "genres": ([[0], [1, 2], [], [3]], pa.list_(pa.int64())),
    "price": ([0.5, 1.5, -2.0, 4.0], pa.float32()),
    "liked": ([1, 0, 1, 0], pa.float32()),
}


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
