"""Latencies of several ways to do the same, which take turns within each round."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np


def latencies(
    ways: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:  # milliseconds, a value per round
    """Time each way once per round, after a tenth of the rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-max(1, rounds // 10), rounds):
        for name, call in ways.items():
            start = clock()
            call()
            if number >= 0:
                times[name].append((clock() - start) * 1e3)
    return {name: np.array(values) for name, values in times.items()}
