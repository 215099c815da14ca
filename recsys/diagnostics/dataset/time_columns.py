"""Read the time range of impressions from the files' footers, if a column has times.

A column has times if its type is a timestamp or date, or if it is an integer with a usual name. The
schema need not name it. Training does not read it, but if splits overlap in time, the test split
has rows from the period of training.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.parquet.file import open_parquet
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import Schema

NAMES = ("timestamp", "time", "datetime", "date", "ts", "event_time", "event_timestamp")
# Ranges of integers read as seconds, milli-, micro- or nanoseconds since 1970, from 1973 on.
UNITS = ((1e8, 1e10, 1.0), (1e11, 1e13, 1e3), (1e14, 1e16, 1e6), (1e17, 1e19, 1e9))


def time_ranges(rows: ParquetRows, schema: Schema) -> dict[str, tuple[Any, Any]]:
    """Return the first and last time of each column with times, by name."""
    found: dict[str, tuple[Any, Any]] = {}
    for file in {str(group.file): group.file for group in rows.row_groups}.values():
        with open_parquet(file) as parquet:
            names = [field.name for field in parquet.schema_arrow if _tells_time(field, schema)]
            for name in names:
                for of_group in footer_statistics(parquet.metadata, name):
                    if of_group is not None and of_group.has_min_max:
                        ends = (*found.get(name, ()), of_group.min, of_group.max)
                        found[name] = min(ends, key=seconds), max(ends, key=seconds)
    return found


def _tells_time(field: pa.Field, schema: Schema) -> bool:
    if pa.types.is_timestamp(field.type) or pa.types.is_date(field.type):
        return True
    is_named = field.name.lower() in NAMES and field.name not in schema.columns
    return is_named and pa.types.is_integer(field.type)


def footer_statistics(metadata: pq.FileMetaData, name: str) -> Iterator[pq.Statistics | None]:
    """Yield a column's statistics for each row group; None where the footer has none."""
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = map(group.column, range(group.num_columns))
        yield next((c.statistics for c in columns if c.path_in_schema == name), None)


def seconds(moment: Any) -> float:
    """Return a moment in seconds since 1970, by which files of different types are compared.

    Integers that are no times are returned as they are; dates and times without a zone are UTC.
    """
    if isinstance(moment, int):
        return next((moment / unit for low, high, unit in UNITS if low <= moment < high), moment)
    if not isinstance(moment, datetime):
        moment = datetime(moment.year, moment.month, moment.day)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def in_words(moment: Any) -> str:
    """Format a moment as date and time to the minute; unchanged if it cannot be read as a time."""
    if isinstance(moment, int) and any(low <= moment < high for low, high, _ in UNITS):
        moment = datetime.fromtimestamp(seconds(moment), UTC)
    return moment.strftime("%Y-%m-%d %H:%M") if hasattr(moment, "strftime") else str(moment)
