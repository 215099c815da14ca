"""Compute settings of steps from the values of all training rows, in one pass.

Only finite values count. The result depends only on the values and their order.

Shapes: N values of a part of the rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from embeddings.vocabulary.fixed import mix64

SAMPLED = 1 << 22  # largest number of values with exact quantiles; also the size of a sample


class Fit(ABC):
    """Computes fitted settings of one step.

    Subclasses take the other settings of the step as keyword arguments.
    """

    num_values = 0  # number of values so far

    def add(self, values: np.ndarray) -> None:  # float64 [N]
        """Include some values; those that are not finite are left out."""
        values = values[np.isfinite(values)]
        if len(values):
            self._add(values)
            self.num_values += len(values)

    @abstractmethod
    def _add(self, values: np.ndarray) -> None:
        """Include finite values, at least one."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """Return the fitted settings as plain values; at least one value was added."""


class Moments(Fit):
    """Mean and standard deviation, merged from those of the parts (Chan et al., 1979)."""

    def __init__(self, **settings: Any) -> None:
        """Start without values."""
        self.mean = self.squares = 0.0  # squares: sum of squared distances to the mean

    def _add(self, values: np.ndarray) -> None:
        total, mean = self.num_values + len(values), float(values.mean())
        distance = mean - self.mean
        self.squares += float(np.square(values - mean).sum())
        self.squares += distance**2 * self.num_values * len(values) / total
        self.mean += distance * len(values) / total

    def result(self) -> dict[str, Any]:
        """Return mean and deviation."""
        return {"mean": self.mean, "std": math.sqrt(self.squares / self.num_values)}


class Quantiles(Fit):
    """Boundaries of `quantiles` buckets with nearly equal numbers of values.

    Of more than `SAMPLED` values, those with the smallest hashes of their positions are kept: a
    sample without replacement, the same in every run.
    """

    def __init__(self, quantiles: int, **settings: Any) -> None:
        """Start without values."""
        self.quantiles = quantiles
        self.values, self.keys = np.zeros(0), np.zeros(0, np.uint64)

    def _add(self, values: np.ndarray) -> None:
        numbers = np.arange(self.num_values, self.num_values + len(values), dtype=np.uint64)
        self.values = np.concatenate([self.values, values])
        self.keys = np.concatenate([self.keys, mix64(numbers)])
        if len(self.keys) > SAMPLED:
            kept = np.argpartition(self.keys, SAMPLED)[:SAMPLED]
            self.values, self.keys = self.values[kept], self.keys[kept]

    def result(self) -> dict[str, Any]:
        """Return the boundaries, each once."""
        shares = np.arange(1, self.quantiles) / self.quantiles
        return {"boundaries": np.unique(np.quantile(self.values, shares)).tolist()}
