"""Items that cannot be candidates of a row, because they became available after its time.

A moment is a number or a time in microseconds. Shapes: R rows, I items, K candidates.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
import torch
from torch import Tensor

from recsys.build import Job
from recsys.config.ranking import RetrievalSettings
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.file import column_type, open_parquet, read_row_group
from recsys.data.parquet.rows import ParquetRows
from recsys.data.row_source import RowSource
from recsys.storage.location import Location


@dataclass(frozen=True)
class LaterItems:
    """Moments of rows, and the moments from which items of a catalogue are available."""

    rows: Tensor  # float64 [R]
    items: Tensor  # int64 [I], ids, ascending
    moments: Tensor  # float64 [I]

    def mask(self, rows: slice, items: Tensor) -> Tensor:  # [K] of the catalogue -> bool [rows, K]
        """Return which items became available only after each of the rows."""
        moments = self.moments[torch.searchsorted(self.items, items)]
        return moments > self.rows[rows].unsqueeze(1)


def later_items(
    job: Job, settings: RetrievalSettings, rows: RowSource, positions: Tensor
) -> LaterItems | None:  # int64 [R]
    """Read the moments of the rows at `positions` and of all items; None without the setting.

    An item without a moment is always available.
    """
    if settings.available_from is None:
        return None
    if not isinstance(rows, ParquetRows) or job.schema.items is None:
        raise ValueError(
            f"ranking.available_from is '{settings.available_from}', a column of items/*.parquet, "
            "but the dataset has no items or its rows are no Parquet files; set it to null"
        )
    row_chunks = _row_chunks(rows, settings.row_time)
    row_moments, rows_are_times = _numbers(row_chunks, settings.row_time)
    table = job.store.items if job.store else ItemTable(job.root, job.schema, job.config.on_bad_row)
    item_chunks = ((file, column) for file, _, column in table.chunks(settings.available_from))
    moments, are_times = _numbers(item_chunks, settings.available_from)
    if None not in (rows_are_times, are_times) and rows_are_times != are_times:
        raise ValueError(
            f"{job.root}: column '{settings.row_time}' of the rows and column "
            f"'{settings.available_from}' of the items are not both times or both numbers; write "
            "them in one type"
        )
    units = _unit(row_moments), _unit(moments)
    if None not in units and units[0] != units[1]:
        raise ValueError(
            f"{job.root}: column '{settings.row_time}' of the rows seems to be in {units[0]} since "
            f"1970 and column '{settings.available_from}' of the items in {units[1]}; write them "
            "in one unit"
        )
    row_moments = row_moments[positions.numpy()]
    if np.isnan(row_moments).any():
        raise ValueError(
            f"{job.root}: column '{settings.row_time}' is null in a row, whose candidates are not "
            "known then; fill it"
        )
    moments = np.nan_to_num(moments, nan=-np.inf)[table.rows[np.argsort(table.ids)]]
    ids = torch.from_numpy(np.sort(table.ids))
    return LaterItems(torch.from_numpy(row_moments), ids, torch.from_numpy(moments))


# Ranges of numbers that, as seconds, ms, us or ns since 1970, are times from 1973 on.
UNITS = {"s": (1e8, 1e10), "ms": (1e11, 1e13), "us": (1e14, 1e16), "ns": (1e17, 1e19)}


def _unit(moments: np.ndarray) -> str | None:  # float64 [N], NaN for none
    """Return the unit of times whose median is in one of `UNITS`; None for other numbers."""
    if np.isnan(moments).all():
        return None
    median = float(np.nanmedian(moments))
    return next((name for name, (lower, upper) in UNITS.items() if lower <= median < upper), None)


Chunk = tuple[Location, pa.Array | pa.ChunkedArray]


def _row_chunks(rows: ParquetRows, name: str) -> Iterator[Chunk]:
    for file in dict.fromkeys(group.file for group in rows.row_groups):
        with open_parquet(file) as parquet:
            column_type(parquet, file, name)
            for group in range(parquet.num_row_groups):
                yield file, read_row_group(parquet, file, group, [name])[name]


def _numbers(chunks: Iterable[Chunk], name: str) -> tuple[np.ndarray, bool | None]:
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
        if not is_time and (unit := _unit(arrays[-1])):
            first_unit = first_unit or (unit, file)
            if unit != first_unit[0]:
                raise ValueError(
                    f"{file}: column '{name}' seems to be in {unit} since 1970, but in "
                    f"{first_unit[1]} in {first_unit[0]}; write all files in one unit"
                )
    return np.concatenate(arrays), None if first is None else first[0]
