"""Runs a program in processes of its own, and compares the datasets that programs wrote."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.events.splits import SPLITS

SECONDS_BETWEEN_LOOKS = 0.05
TABLES = (*SPLITS, "item_counts.parquet", "vocabulary/user.parquet", "vocabulary/item.parquet")


@dataclass(frozen=True)
class Measured:
    """Time and memory of a program.

    seconds: wall clock.
    processor: seconds of processor time, user and system.
    peak: most bytes that its processes had in memory at a time, mapped files included.
    """

    seconds: float
    processor: float
    peak: int


def measured(words: list[str]) -> Measured:
    """Run Python with these words and wait for it.

    Raises:
        RuntimeError: it ended with an error.
    """
    start, processor, peak = time.perf_counter(), _processor(), 0
    job = subprocess.Popen([sys.executable, *words])
    while job.poll() is None:
        peak = max(peak, _resident(job.pid))
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if job.returncode:
        raise RuntimeError(f"{' '.join(words[:2])} ended with {job.returncode}")
    return Measured(time.perf_counter() - start, _processor() - processor, peak)


def _processor() -> float:
    """Return the processor time of all processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _resident(pid: int) -> int:
    """Return the resident bytes of a process and all that it started; 0 after its end."""
    try:
        process = psutil.Process(pid)
        return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def differences(first_folder: Path, second_folder: Path) -> list[str]:
    """Return the tables and columns in which two datasets differ.

    Numbers may differ by the last bits of float32: each program has a logarithm of its own.
    """
    different = []
    for name in TABLES:
        tables = [pq.read_table(folder / name) for folder in (first_folder, second_folder)]
        names = [table.column_names for table in tables]
        if names[0] != names[1]:
            return [f"{name}: columns {names[0]} and {names[1]}"]
        different += [
            f"{name}: {column}"
            for column in names[0]
            if not _same(*(table[column].combine_chunks() for table in tables))
        ]
    return different


def _same(first: pa.Array, second: pa.Array) -> bool:
    if pa.types.is_list(first.type):
        lengths = [lists.value_lengths().to_numpy() for lists in (first, second)]
        return np.array_equal(*lengths) and _same(first.flatten(), second.flatten())
    if pa.types.is_floating(first.type):
        return len(first) == len(second) and np.allclose(first, second, rtol=1e-6, atol=1e-7)
    return bool(first.equals(second.cast(first.type)))
