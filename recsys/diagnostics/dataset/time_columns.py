"""When impressions happened, where the files say so: from their footers alone.

A column tells time if its type does, or if it is an integer named like one. The schema need not
name it: training does not read it, but splits that overlap in time test on what was trained on.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from recsys.data.parquet.file import open_parquet
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import Schema

NAMES = ("timestamp", "time", "datetime", "date", "ts", "event_time", "event_timestamp")
# Integers that are seconds, milliseconds, microseconds or nanoseconds since 1970, from 1973 on.
UNITS = ((1e8, 1e10, 1.0), (1e11, 1e13, 1e3), (1e14, 1e16, 1e6), (1e17, 1e19, 1e9))


def time_ranges(rows: ParquetRows, schema: Schema) -> dict[str, tuple[Any, Any]]:
    """First and last of each column that tells time, by name."""
    found: dict[str, tuple[Any, Any]] = {}
    for file in {str(group.file): group.file for group in rows.row_groups}.values():
        with open_parquet(file) as parquet:
            names = [field.name for field in parquet.schema_arrow if _tells_time(field, schema)]
            for name in names:
                for low, high in _statistics(parquet.metadata, name):
                    before = found.get(name, (low, high))
                    found[name] = (min(before[0], low), max(before[1], high))
    return found


def _tells_time(field: pa.Field, schema: Schema) -> bool:
    if pa.types.is_timestamp(field.type) or pa.types.is_date(field.type):
        return True
    is_named = field.name.lower() in NAMES and field.name not in schema.columns
    return is_named and pa.types.is_integer(field.type)


def _statistics(metadata: Any, name: str) -> list[tuple[Any, Any]]:
    found = []
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        for place in range(group.num_columns):
            column = group.column(place)
            statistics = column.statistics if column.path_in_schema == name else None
            if statistics is not None and statistics.has_min_max:
                found.append((statistics.min, statistics.max))
    return found


def in_words(moment: Any) -> str:
    """A date and time to the minute, as far as a moment can be read as one."""
    if isinstance(moment, int):
        for low, high, unit in UNITS:
            if low <= moment < high:
                moment = datetime.fromtimestamp(moment / unit, UTC)
                break
    return moment.strftime("%Y-%m-%d %H:%M") if hasattr(moment, "strftime") else str(moment)
