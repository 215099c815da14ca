"""Reads columns of the items' Parquet files for a few items.

Only row groups that hold one of these items are read, since all images may be terabytes. Columns
need not be in the schema.

Shapes: I chosen items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.build import Job
from recsys.data.filesystem import Location
from recsys.data.items.item_table import ROWS_PER_CHUNK, ItemTable
from recsys.data.parquet.file import READ_ERRORS, column_type, open_parquet
from recsys.data.schema import read_schema


def item_files(root: Location) -> list[Location]:
    """Return the items' files of a dataset; none if its schema has no items."""
    return [] if read_schema(root).items is None else (root / "items").files(".parquet")


def item_table(job: Job) -> ItemTable | None:
    """Return the run's items; None if the dataset has no items' files."""
    if job.store is not None:
        return job.store.items
    if job.schema.items is None or not (job.root / "items").files(".parquet"):
        return None
    return ItemTable(job.root, job.schema, on_bad_row="skip")


def column_values(table: ItemTable, name: str, items: np.ndarray) -> list[Any]:
    """Return a column's values for items, int64 [I]; None where null or where an item has no row.

    Raises:
        ValueError: a file lacks the column or cannot be read.
    """
    row_of = dict(zip(table.ids.tolist(), table.rows.tolist()))
    rows = [row_of.get(item, -1) for item in items.tolist()]
    wanted = np.array(sorted(set(rows) - {-1}), np.int64)
    found: dict[int, Any] = {}
    first = 0
    for file in table.files:
        with open_parquet(file, streaming=True) as parquet:
            column_type(parquet, file, name)
            for group in range(parquet.num_row_groups):
                stop = first + parquet.metadata.row_group(group).num_rows
                inside = wanted[(wanted >= first) & (wanted < stop)]
                if len(inside):
                    values = _values_in(parquet, file, group, name, inside - first)
                    found.update(zip(inside.tolist(), values))
                first = stop
    return [found.get(row) for row in rows]


def _values_in(
    parquet: pq.ParquetFile,
    file: Location,
    group: int,
    name: str,
    places: np.ndarray,  # int64 [items of the group], ascending
) -> Iterator[Any]:
    """Yield the values at these rows of a row group."""
    start = 0
    try:
        for batch in parquet.iter_batches(ROWS_PER_CHUNK, row_groups=[group], columns=[name]):
            inside = places[(places >= start) & (places < start + len(batch))] - start
            yield from _as_python(batch.column(0).take(pa.array(inside)))
            start += len(batch)
    except READ_ERRORS as error:
        raise ValueError(
            f"{file}: column '{name}', row group {group}: cannot be read ({error}); write the "
            "file again"
        ) from error


def _as_python(values: pa.Array) -> list[Any]:
    """Return values as Python objects; bytes of a text that are not UTF-8 are replaced."""
    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        encoded = values.cast(pa.large_binary()).to_pylist()
        return [None if text is None else text.decode(errors="replace") for text in encoded]


def column_types(files: Sequence[Location]) -> dict[str, pa.DataType]:
    """Return the types of the columns that all items' files have, in the schema or not."""
    kinds: dict[str, pa.DataType] | None = None
    for file in files:
        with open_parquet(file) as parquet:
            found = {field.name: field.type for field in parquet.schema_arrow}
        kinds = found if kinds is None else {name: kinds[name] for name in kinds if name in found}
    return kinds or {}
