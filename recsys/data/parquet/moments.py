"""Columns with the moment of each row or item: times, or numbers of one unit.

Shapes: N rows or items.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from recsys.data.parquet.file import column_type, open_parquet, read_row_group
from recsys.data.parquet.rows import ParquetRows
from recsys.storage.location import Location

# Ranges of numbers that, as seconds, ms, us or ns since 1970, are times from 1973 on.
UNITS = {"s": (1e8, 1e10), "ms": (1e11, 1e13), "us": (1e14, 1e16), "ns": (1e17, 1e19)}


def time_unit(moments: np.ndarray) -> str | None:  # float64 [N], NaN for none
    """Return the unit of times whose median is in one of `UNITS`; None for other numbers."""
    if np.isnan(moments).all():
        return None
    median = float(np.nanmedian(moments))
    return next((name for name, (lower, upper) in UNITS.items() if lower <= median < upper), None)


Chunk = tuple[Location, pa.Array | pa.ChunkedArray]


def row_moments(rows: ParquetRows, name: str) -> tuple[np.ndarray, bool | None]:  # float64 [N]
    """Return `moments_of` of a column of rows; a ValueError if a file lacks it."""
    return moments_of(_row_chunks(rows, name), name)


def _row_chunks(rows: ParquetRows, name: str) -> Iterator[Chunk]:
    for file in dict.fromkeys(group.file for group in rows.row_groups):
        with open_parquet(file) as parquet:
            if name not in (names := parquet.schema_arrow.names):
                raise ValueError(f"{file}: column '{name}' is missing; the file has {names}")
            column_type(parquet, file, name)
            for group in range(parquet.num_row_groups):
                yield file, read_row_group(parquet, file, group, [name])[name]


def moments_of(chunks: Iterable[Chunk], name: str) -> tuple[np.ndarray, bool | None]:
    """Return a column as float64, NaN for null, and whether it has times, then in microseconds.

    The second value is None if all values are null. Files with times and files with numbers, or
    numbers in two units, are a ValueError.
    """
    arrays: list[np.ndarray] = []
    first: tuple[bool, Location] | None = None  # whether the first value is a time, and its file
    first_unit: tuple[str, Location] | None = None
    for file, column in chunks:
        is_time = pt.is_timestamp(column.type) or pt.is_date(column.type)
        if column.null_count < len(column):
            first = first or (is_time, file)
            if is_time != first[0]:
                raise ValueError(
                    f"{file}: column '{name}' has type {column.type}, but in {first[1]} it has "
                    f"{'times' if first[0] else 'numbers'}; write all files in one type"
                )
        try:
            if is_time:  # pandas writes nanoseconds, which are truncated
                column = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
            # In float64, microseconds are exact up to the year 2255, nanoseconds only to 256 ns.
            arrays.append(column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))
        except pa.ArrowException as error:
            problem = f"has no times or numbers ({error})"
            raise ValueError(f"{file}: column '{name}': {problem}") from error
        if not is_time and (unit := time_unit(arrays[-1])):
            first_unit = first_unit or (unit, file)
            if unit != first_unit[0]:
                raise ValueError(
                    f"{file}: column '{name}' seems to be in {unit} since 1970, but in "
                    f"{first_unit[1]} in {first_unit[0]}; write all files in one unit"
                )
    return np.concatenate(arrays), None if first is None else first[0]
