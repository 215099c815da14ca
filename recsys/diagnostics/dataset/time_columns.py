"""Reads the time range of a split from the footers: of times, and of integers with a usual name."""

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


def time_ranges(rows: ParquetRows, schema: Schema) -> dict[str, tuple[datetime, datetime]]:
    """Return the first and last time of each column with times, by name."""
    times: dict[str, list[datetime]] = {}
    for file in {str(group.file): group.file for group in rows.row_groups}.values():
        with open_parquet(file) as parquet:
            for name in (field.name for field in parquet.schema_arrow if _has_times(field, schema)):
                for statistics in footer_statistics(parquet.metadata, name):
                    if statistics is not None and statistics.has_min_max:
                        ends = (_time(statistics.min), _time(statistics.max))
                        times.setdefault(name, []).extend(time for time in ends if time is not None)
    return {name: (min(ends), max(ends)) for name, ends in times.items() if ends}


def _has_times(field: pa.Field, schema: Schema) -> bool:
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


def _time(value: Any) -> datetime | None:
    """Return an integer, date or time as time in UTC; None for an integer that is none."""
    if isinstance(value, int):
        units = (unit for low, high, unit in UNITS if low <= value < high)
        return next((datetime.fromtimestamp(value / unit, UTC) for unit in units), None)
    if not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    return value if value.tzinfo else value.replace(tzinfo=UTC)
