"""Time variants against each other in one run: a few steps of each in turn, round after round.

The ratio within a round hardly depends on other load; its median over rounds is reported.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.timing.ranks import (
    CurrentProcesses,
    Processes,
    RankReport,
    SpawnedProcesses,
    is_launched,
    silence_advice_to_library_developers,
)
from benchmarks.timing.step_work import BatchCounts
from benchmarks.timing.steps import Variant
from recsys.distributed.ranks import joined_ranks


@dataclass(frozen=True)
class Effort:
    """Length of a measurement.

    warm_up: steps before the first round, at least 1.
    steps: the least steps of each variant in a round.
    seconds: the least time of a variant's steps in a round; quick steps are then repeated.
    profiled: steps under the profiler at the end; 0: none.
    threads: threads of each rank.
    matmul_size: size of the matrices whose product gives the peak rate.
    """

    warm_up: int = 4
    rounds: int = 5
    steps: int = 3
    seconds: float = 1.0
    profiled: int = 4
    threads: int = 1
    matmul_size: int = 2048

    def __post_init__(self) -> None:
        for name in ("warm_up", "rounds", "steps", "threads", "matmul_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"effort.{name} is {getattr(self, name)}; it must be at least 1")


FULL_EFFORT = Effort()
QUICK_EFFORT = Effort(
    warm_up=1, rounds=2, steps=2, seconds=0.0, profiled=1, threads=1, matmul_size=64
)


@dataclass
class Measurement:
    """Measurements of one variant."""

    variant: Variant
    world_size: int
    seconds: list[list[float]]  # by round: seconds of each step, on the first rank
    matmul_rates: list[float]  # FLOP/s, of all rounds and ranks
    reports: list[RankReport]  # by rank
    profile: dict[str, Any] = field(default_factory=dict)  # see `Steps.profile`

    @property
    def rows(self) -> int:
        """Rows per step, on all ranks."""
        return sum(report.rows for report in self.reports)

    @property
    def step_seconds(self) -> float:
        return median(second for round_seconds in self.seconds for second in round_seconds)

    @property
    def part_seconds(self) -> dict[str, float]:
        """Seconds by part without the profiler's overhead: its shares, of the median step."""
        parts = self.profile["parts"]
        total = sum(parts.values())
        return {name: seconds / total * self.step_seconds for name, seconds in parts.items()}

    @property
    def arithmetic_seconds(self) -> float | None:
        """Seconds of the step's FLOPs at the rate of a large product; None for plain PyTorch."""
        flops = self.profile.get("flops")
        return None if flops is None else float(flops / median(self.matmul_rates))

    def samples_per_second(self, percentile: float) -> float:
        """Return the rate that `percentile` percent of the steps stay under."""
        all_seconds = [second for round_seconds in self.seconds for second in round_seconds]
        return self.rows / float(np.percentile(all_seconds, 100 - percentile))

    @property
    def counts(self) -> list[BatchCounts]:
        """Counts of all steps and ranks; empty for the plain baseline."""
        return [count for report in self.reports for count in report.counts]

    @property
    def peak_bytes(self) -> int:
        """Peak of memory of the rank that needs most."""
        return max(report.peak_bytes for report in self.reports)


@dataclass(frozen=True)
class Ratio:
    """Ratio of samples/s to those of another variant, over rounds."""

    median: float
    lowest: float
    highest: float


def ratio(measurement: Measurement, baseline: Measurement) -> Ratio:
    """Compute the ratio of samples/s, round by round."""
    ratios = [
        (measurement.rows / median(mine)) / (baseline.rows / median(theirs))
        for mine, theirs in zip(measurement.seconds, baseline.seconds, strict=True)
    ]
    return Ratio(median(ratios), min(ratios), max(ratios))


def measure(
    variants: Sequence[Variant], effort: Effort, in_process: bool = False
) -> list[Measurement]:
    """Measure the variants, of different names, in turns.

    With `in_process`, and always under torchrun, all share this process.

    Raises:
        RuntimeError: a rank of a variant failed; its traceback is in the message.
    """
    with ExitStack() as stack:
        opened: list[Processes] = []
        if in_process or is_launched():
            silence_advice_to_library_developers()
            torch.set_num_threads(effort.threads)
            ranks = stack.enter_context(joined_ranks(variants[0].config().device))
            for variant in variants:
                opened.append(CurrentProcesses(variant, ranks))
        else:
            for variant in variants:
                opened.append(stack.enter_context(_spawned(variant, effort.threads)))
        return _measure(variants, opened, effort)


@contextmanager
def _spawned(variant: Variant, threads: int) -> Iterator[SpawnedProcesses]:
    processes = SpawnedProcesses(variant, threads)
    try:
        yield processes
    finally:
        processes.close()


def _measure(
    variants: Sequence[Variant], opened: list[Processes], effort: Effort
) -> list[Measurement]:
    seconds: list[list[list[float]]] = [[] for _ in variants]
    rates: list[list[float]] = [[] for _ in variants]
    steps = []
    for processes in opened:
        warm = processes.call("run", effort.warm_up)[0]  # seconds of the first rank: all agree
        steps.append(max(effort.steps, math.ceil(effort.seconds / warm[-1])))
    for _ in range(effort.rounds):
        for index, processes in enumerate(opened):
            rates[index] += processes.call("matmul_rate", effort.matmul_size)
            seconds[index].append(processes.call("run", steps[index])[0])
    measurements = []
    for index, (variant, processes) in enumerate(zip(variants, opened, strict=True)):
        reports = processes.call("report")  # before the profiler takes memory of its own
        profile = processes.call("profile", effort.profiled)[0] if effort.profiled else {}
        measurements.append(
            Measurement(variant, len(reports), seconds[index], rates[index], reports, profile)
        )
    return measurements
