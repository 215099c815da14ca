"""Items that cannot be candidates of a row, because they became available after its time.

A moment is a number or a time in microseconds. Shapes: R rows, I items, K candidates.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recsys.build import Job
from recsys.config.ranking import RetrievalSettings
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.moments import moments_of, row_moments, time_unit
from recsys.data.parquet.rows import ParquetRows
from recsys.data.row_source import RowSource


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
    moments_of_rows, rows_are_times = row_moments(rows, settings.row_time)
    table = job.store.items if job.store else ItemTable(job.root, job.schema, job.config.on_bad_row)
    item_chunks = ((file, column) for file, _, column in table.chunks(settings.available_from))
    moments, are_times = moments_of(item_chunks, settings.available_from)
    if None not in (rows_are_times, are_times) and rows_are_times != are_times:
        raise ValueError(
            f"{job.root}: column '{settings.row_time}' of the rows and column "
            f"'{settings.available_from}' of the items are not both times or both numbers; write "
            "them in one type"
        )
    units = time_unit(moments_of_rows), time_unit(moments)
    if None not in units and units[0] != units[1]:
        raise ValueError(
            f"{job.root}: column '{settings.row_time}' of the rows seems to be in {units[0]} since "
            f"1970 and column '{settings.available_from}' of the items in {units[1]}; write them "
            "in one unit"
        )
    moments_of_rows = moments_of_rows[positions.numpy()]
    if np.isnan(moments_of_rows).any():
        raise ValueError(
            f"{job.root}: column '{settings.row_time}' is null in a row, whose candidates are not "
            "known then; fill it"
        )
    moments = np.nan_to_num(moments, nan=-np.inf)[table.rows[np.argsort(table.ids)]]
    ids = torch.from_numpy(np.sort(table.ids))
    return LaterItems(torch.from_numpy(moments_of_rows), ids, torch.from_numpy(moments))
