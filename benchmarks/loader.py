"""Speed of the loader alone from Parquet to batches, and how long a training step waits for it.

    python -m benchmarks.loader --out FOLDER

Whole epochs of setting A in batches of 512, per history length, with content and without. One
thread builds alone, then threads build ahead of a trainer that computes `--step_ms` per batch.
Exits with 1 below 100,000 samples/s per core at a history of 50, or at 2 % of a step waiting.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import torch
from jsonargparse import auto_cli

from benchmarks.dataset import DatasetSize, write_dataset
from benchmarks.results import RESULTS, Result, write_result
from recsys.config import ModalitySettings
from recsys.data.batch import Batch
from recsys.data.batch_builder import BatchBuilder
from recsys.data.interactions import Interactions, loader
from recsys.data.items.content_store import ContentStore
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import Schema, load_schema
from recsys.storage.location import Location

AIM, AIM_HISTORY = 100_000, 50  # samples/s per core, content included
MAX_WAITING = 0.02  # share of a step
MODALITIES = ("text", "image")
VALUES = 13_000_000  # history items of an epoch at most; longer histories get fewer rows


@dataclass(frozen=True)
class Case:
    """One case: the data that is loaded, and the number of threads besides the trainer's."""

    history: int
    content: bool
    num_workers: int

    @property
    def has_aim(self) -> bool:
        return self.content and self.history == AIM_HISTORY


@dataclass(frozen=True)
class Measured:
    """Medians over the passes.

    per_core: samples per second of processor time, of all threads of the process.
    first_batch: seconds from the first read window until the first batch is ready.
    waiting: share of a step spent waiting for the next batch, after the first.
    """

    case: Case
    samples_per_second: float
    per_core: float
    first_batch: float
    waiting: float | None

    @property
    def passes(self) -> bool | None:
        if not self.case.has_aim:
            return None
        return self.per_core >= AIM if self.waiting is None else self.waiting < MAX_WAITING


class Step:
    """Stand-in for a training step: matrix products that keep one core busy for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.matrix = torch.rand(256, 256)

    def __call__(self) -> None:
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            self.matrix @ self.matrix


def benchmark(
    out: Path,
    history: Sequence[int] = (50, 1000),
    workers: Sequence[int] = (1, 2),
    rows: int = 131_072,
    items: int = 100_000,
    batch_size: int = 512,
    passes: int = 5,
    step_ms: float = 20.0,
    results: Path = RESULTS,
) -> bool:
    """Measure all cases and return whether the aims are reached.

    Args:
        out: folder for datasets and content.
        history: items in the history of each row.
        workers: numbers of threads that build batches ahead.
        rows: rows of the dataset; long histories get fewer.
        items: items of the dataset.
        batch_size: rows per batch.
        passes: epochs per case, after one warm-up epoch.
        step_ms: how long the trainer computes per batch.
        results: folder for the figures.
    """
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    step = Step(step_ms / 1e3)
    measured = []
    for length, content in product(history, (False, True)):
        size = DatasetSize(
            num_rows=min(rows, max(VALUES // length, batch_size)), num_items=items, history=length
        )
        name = f"loader-{size.num_rows}-{items}-{length}"
        root = Location.of(write_dataset(out / name, size, shared_items=out / "items"))
        schema = load_schema(root)
        store = _content(root, schema, out / "cache") if content else None
        split = ParquetRows.of_split(root, "train", schema)
        build = BatchBuilder(schema, ["user", "tags"], store)
        interactions = Interactions(split, build, batch_size, seed=0)
        for number in (0, *workers):
            case = Case(length, content, number)
            measured.append(_measure(case, interactions, passes, step if number else None))
            print(asdict(measured[-1]), flush=True)
    write_result(_result(measured, step_ms), results)
    return all(row.passes is not False for row in measured)


def _content(root: Location, schema: Schema, cache: Path) -> ContentStore:
    modalities = {name: ModalitySettings(kind="feature", column=name) for name in MODALITIES}
    store = ContentStore(ItemTable(root, schema), modalities, cache)
    for name in MODALITIES:
        store.build(name)
    return store


def _measure(case: Case, interactions: Interactions, passes: int, step: Step | None) -> Measured:
    speeds, per_core, first_batch, waiting = [], [], [], []
    for epoch in range(passes + 1):
        interactions.begin(epoch)
        wall, processor = time.perf_counter(), time.process_time()
        with closing(loader(interactions, case.num_workers, pin_memory=False)) as batches:
            samples, first, computed = _drain(batches, step)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        if epoch:  # the first pass fills the system's page cache
            speeds.append(samples / wall)
            per_core.append(samples / processor)
            first_batch.append(first)
            waiting.append(1 - computed / (wall - first))
    return Measured(
        case,
        median(speeds),
        median(per_core),
        median(first_batch),
        None if step is None else median(waiting),
    )


def _drain(batches: Iterable[Batch], step: Step | None) -> tuple[int, float, float]:
    """Run a pass; return (samples, seconds until the first batch, seconds of computing)."""
    samples, first, computed = 0, 0.0, 0.0
    start = time.perf_counter()
    for batch in batches:
        begin = time.perf_counter()
        first = first or begin - start
        samples += batch.batch_size
        if step is not None:
            step()
            computed += time.perf_counter() - begin
    return samples, first, computed


def _result(measured: list[Measured], step_ms: float) -> Result:
    columns = ["history", "content", "threads", "samples/s", "per core", "first batch, ms"]
    columns += ["waiting", "aim"]
    verdicts = {True: "reached", False: "missed", None: ""}
    rows: list[Sequence[str]] = [
        (
            str(row.case.history),
            "text, image" if row.case.content else "none",
            str(row.case.num_workers),
            f"{row.samples_per_second:,.0f}",
            f"{row.per_core:,.0f}",
            f"{1e3 * row.first_batch:.0f}",
            "" if row.waiting is None else f"{row.waiting:.2%}",
            verdicts[row.passes],
        )
        for row in measured
    ]
    reading = [
        f"The aim is {AIM:,} samples/s per core with content at a history of {AIM_HISTORY}, and "
        f"less than {MAX_WAITING:.0%} of a step of {step_ms:g} ms spent waiting for data, after "
        "the first batch of an epoch. Without threads the loader does nothing else; with threads, "
        "samples/s are those of the steps and the processor time includes theirs.",
    ]

    records: list[dict[str, Any]] = [
        {"benchmark": "loader", **asdict(row), "passes": row.passes} for row in measured
    ]
    return Result("loader", "Parquet to batches", records, columns, rows, None, reading)


if __name__ == "__main__":
    sys.exit(0 if auto_cli(benchmark, as_positional=False) else 1)
