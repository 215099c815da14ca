"""Ranges of the dense columns: unscaled numbers dominate all other inputs of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from recsys.data.parquet.values import ROW_POSITION
from recsys.data.schema import Schema

if TYPE_CHECKING:
    from recsys.distributed.ranks import Ranks

LARGEST = 1000.0  # absolute value from which on a dense column is reported as unscaled


class DenseRanges:
    """Smallest and largest value of each dense column, collected while rows are read."""

    def __init__(self, schema: Schema) -> None:
        """Start without rows."""
        self.least = dict.fromkeys(schema.of_kind("dense"), np.inf)
        self.greatest = dict.fromkeys(self.least, -np.inf)

    def add(self, table: pa.Table) -> None:
        """Include rows; padding rows are left out."""
        is_row = table[ROW_POSITION].to_numpy() >= 0
        for column in self.least:
            values = table[column].to_numpy()[is_row]
            self.least[column] = float(values.min(initial=self.least[column]))
            self.greatest[column] = float(values.max(initial=self.greatest[column]))

    def findings(self, ranks: Ranks) -> Iterator[tuple[str, str]]:
        """Return the findings over the rows of all ranks. A collective."""
        of_ranks = ranks.gather((self.least, self.greatest))
        found = (
            dense_finding(
                column,
                min(least[column] for least, _ in of_ranks),
                max(greatest[column] for _, greatest in of_ranks),
            )
            for column in self.least
        )
        return filter(None, found)


def dense_finding(column: str, least: float, greatest: float) -> tuple[str, str] | None:
    """Return the problem of a column of this range and its fix; None without a problem."""
    if least == greatest:
        what = f"dense column '{column}' is {least:g} in all training rows"
        return what, "it is no help; take it out of schema.yaml"
    if max(abs(least), abs(greatest)) > LARGEST:
        what = f"dense column '{column}' goes from {least:g} to {greatest:g}"
        return what, "take its logarithm or scale it to about 1, or it drowns all else"
    return None
