"""Ranges and moments of the numbers of rows: unscaled ones dominate all other inputs of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from recsys.data.parquet.columns import RowColumns
from recsys.data.parquet.values import ROW_POSITION
from recsys.data.schema import Schema

if TYPE_CHECKING:
    from recsys.distributed.ranks import Ranks

LARGEST = 1000.0  # absolute value from which on a dense column is reported as unscaled
WIDE = 3.0  # absolute value from which on numbers outweigh vectors, whose values are below 1


@dataclass
class NumberRange:
    """Least and greatest of some numbers, and their sums."""

    least: float = math.inf
    greatest: float = -math.inf
    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: np.ndarray) -> None:
        values = values.astype(np.float64)
        self.include(
            NumberRange(
                float(values.min(initial=math.inf)),
                float(values.max(initial=-math.inf)),
                len(values),
                float(values.sum()),
                float(np.square(values).sum()),
            )
        )

    def include(self, other: NumberRange) -> None:
        self.least = min(self.least, other.least)
        self.greatest = max(self.greatest, other.greatest)
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def variance(self) -> float:
        return max(self.squares / self.count - self.mean**2, 0.0)

    @property
    def is_wide(self) -> bool:
        return max(-self.least, self.greatest) > WIDE

    def __str__(self) -> str:
        return f"{self.least:g} to {self.greatest:g}"


class NumberRanges:
    """Ranges of each dense column and each list of numbers, collected while rows are read."""

    def __init__(self, schema: Schema) -> None:
        self.dense = schema.of_kind("dense")
        lists = [name for history in schema.histories for name in history.numbers]
        self.by_column = {name: NumberRange() for name in (*self.dense, *lists)}

    def add(self, table: pa.Table) -> None:
        """Include rows; padding rows are left out."""
        is_row, rows = table[ROW_POSITION].to_numpy() >= 0, RowColumns.of(table)
        for name, column in self.by_column.items():
            column.add(table[name].to_numpy()[is_row] if name in self.dense else rows.values(name))

    def gather(self, ranks: Ranks) -> dict[str, NumberRange]:
        """Return the ranges over the rows of all ranks, on each. A collective."""
        gathered = ranks.gather(self.by_column)
        self.by_column = {name: NumberRange() for name in self.by_column}
        for ranges in gathered:
            for name, column in self.by_column.items():
                column.include(ranges[name])
        return self.by_column


def dense_finding(column: str, least: float, greatest: float) -> tuple[str, str] | None:
    """Return the problem of a column of this range and its fix; None without a problem."""
    if least == greatest:
        what = f"dense column '{column}' is {least:g} in all training rows"
        return what, "it is no help; take it out of schema.yaml"
    if max(abs(least), abs(greatest)) > LARGEST:
        what = f"dense column '{column}' goes from {least:g} to {greatest:g}"
        return what, "take its logarithm or scale it to about 1, or it drowns all else"
    return None
