"""Summarizes streamed numbers in bounded memory: ranges, means and quantiles.

Shapes: N numbers of a call.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
LONGEST = 1 << 20  # longer ones count as this length


@dataclass
class Lengths:
    """Lengths of lists or texts: a histogram, from which quantiles are exact."""

    histogram: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    def add(self, lengths: np.ndarray) -> None:  # lengths: int [N]
        """Count lengths."""
        counts = np.bincount(lengths.astype(np.int64).clip(max=LONGEST))
        size = max(len(counts), len(self.histogram))
        self.histogram = np.pad(self.histogram, (0, size - len(self.histogram)))
        self.histogram[: len(counts)] += counts

    @property
    def count(self) -> int:
        """Return the number of lengths."""
        return int(self.histogram.sum())

    def quantile(self, share: float) -> int:
        """Return the smallest length that at least this share of the lengths do not exceed."""
        return int(np.searchsorted(self.histogram.cumsum(), share * self.count))

    def summary(self) -> dict[str, Any]:
        """Return mean, quantiles, maximum and share of empty ones by name; {} without lengths."""
        if not self.count:
            return {}
        values = np.arange(len(self.histogram))
        return {
            "mean": float(values @ self.histogram / self.count),
            **{name: self.quantile(share) for name, share in QUANTILES.items()},
            "max": int(values[self.histogram > 0].max()),
            "empty_share": float(self.histogram[0] / self.count),
        }


@dataclass
class Range:
    """Least, greatest, mean and standard deviation of finite numbers."""

    least: float = np.inf
    greatest: float = -np.inf
    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: np.ndarray) -> None:  # values: [N], finite
        """Include numbers."""
        if not len(values):
            return
        numbers = values.astype(np.float64)
        self.least = min(self.least, float(numbers.min()))
        self.greatest = max(self.greatest, float(numbers.max()))
        self.count += len(numbers)
        self.total += float(numbers.sum())
        self.squares += float(numbers @ numbers)

    @property
    def mean(self) -> float:
        """Return the mean; 0 without numbers."""
        return self.total / max(self.count, 1)

    def summary(self) -> dict[str, Any]:
        """Return min, max, mean and deviation of the population by name; {} without numbers."""
        if not self.count:
            return {}
        deviation = max(self.squares / self.count - self.mean**2, 0.0) ** 0.5
        found = {"min": self.least, "max": self.greatest, "mean": self.mean}
        return {**found, "deviation": deviation}


@dataclass
class IdRange:
    """Least and greatest of the ids of a column, as rows of its table."""

    least: int | None = None
    greatest: int | None = None
    count: int = 0
    unknown: int = 0  # ids that are not in the vocabulary

    def add(self, ids: np.ndarray, unknown_row: int | None) -> None:  # ids: int64 [N]
        """Include ids; those equal to `unknown_row` count as unknown."""
        if not len(ids):
            return
        least, greatest = int(ids.min()), int(ids.max())
        self.least = least if self.least is None else min(self.least, least)
        self.greatest = greatest if self.greatest is None else max(self.greatest, greatest)
        self.count += len(ids)
        if unknown_row is not None:
            self.unknown += int((ids == unknown_row).sum())

    def summary(self) -> dict[str, Any]:
        """Return the fields and the share of unknown ids by name."""
        return {**asdict(self), "unknown_share": self.unknown / max(self.count, 1)}
