"""Batches of impressions for one rank, which threads build in order ahead of the trainer."""

import os
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, chain
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from recsys.data.batch import Batch
from recsys.data.batch_builder import BatchBuilder
from recsys.data.parquet.columns import RowColumns
from recsys.data.row_source import RowSource, Slice, Stage, Window, between, rank_shares

T = TypeVar("T")
# Submits a job and returns a function that waits for its result or raises its error. Either
# `cache`, which runs the job when the result is first asked for, or a pool's, from `threads`.
Submit = Callable[[Callable[[], Any]], Callable[[], Any]]
WindowRows = tuple[RowColumns, np.ndarray]  # rows of a window, and the order in which to use them
AHEAD = 2  # batches in progress per building thread
MAX_THREADS = 4  # largest number of threads that `auto` uses with a GPU


@contextmanager
def threads(count: int, name: str) -> Generator[Submit]:
    """Yield a function that runs jobs in a pool; on exit, drop waiting jobs, wait for running."""
    initializer: tuple[Any, ...] = ()
    if torch.cuda.is_initialized():  # new threads would use GPU 0
        initializer = torch.cuda.set_device, (torch.cuda.current_device(),)
    pool = ThreadPoolExecutor(count, name, *initializer)
    try:
        yield lambda job: pool.submit(job).result
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(jobs: Iterable[Callable[[], T]], submit: Submit, ahead: int) -> Generator[T]:
    """Yield the results of jobs in order, or raise their errors; run up to `ahead` more jobs."""
    pending: deque[Callable[[], T]] = deque()
    for job in jobs:
        pending.append(submit(job))
        if len(pending) > ahead:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()


@dataclass(eq=False)
class Interactions:
    """Batches of one rank's share of a split; all ranks have equally many, of the same sizes.

    A rank with fewer rows adds a padding row. `seed` shuffles the rows, differently in each epoch.
    """

    rows: RowSource
    build: BatchBuilder
    batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.seed is not None and self.rows.num_rows < self.world_size:
            raise ValueError(
                f"{self.rows.chunks[0].place}: {self.rows.num_rows} training rows cannot be shared "
                f"by {self.world_size} ranks; start fewer ranks"
            )
        self.begin(0)

    def begin(self, epoch: int, stages: Sequence[Stage] = (), first_batch: int = 0) -> None:
        """Go to batch `first_batch` of the epoch's rows that earlier `stages` did not read."""
        self.epoch, self.first_batch = epoch, first_batch
        self.shuffle_seed = None if self.seed is None else (self.seed, epoch)
        shares = rank_shares(self.rows, stages, self.world_size, self.shuffle_seed)
        self.slices, self.remaining = shares[self.rank], sum(map(len, chain(*shares)))
        self.share_rows = -(-self.remaining // self.world_size)  # rows of the largest share
        self.num_batches = -(-self.share_rows // self.batch_size)  # their sizes differ by at most 1

    def batches_until(self, segment: int, num_segments: int) -> int:
        """Return the number of batches of this share in the first `segment` parts of an epoch."""
        if segment == num_segments or not self.remaining:
            return self.num_batches
        rows_done = self.rows.num_rows - self.remaining
        rows = self.rows.num_rows * segment - rows_done * num_segments
        return max(0, rows * self.num_batches // (self.remaining * num_segments))

    def __len__(self) -> int:
        return self.num_batches - self.first_batch

    def __iter__(self) -> Iterator[Batch]:
        """Return the remaining batches of the epoch, read and built in this thread; see `begin`."""
        return in_order(self.jobs(cache), cache, ahead=0)

    def jobs(self, submit: Submit) -> Iterator[Callable[[], Batch]]:
        """Yield one job per batch; the next window of rows is read while one is in use."""
        slices, starts = self.slices, [0, *accumulate(map(len, self.slices))]
        windows: dict[Window, Callable[[], WindowRows]] = {}
        for batch in range(self.first_batch, self.num_batches):
            begin = self.share_rows * batch // self.num_batches
            end = self.share_rows * (batch + 1) // self.num_batches
            first, last = bisect_right(starts, begin) - 1, bisect_left(starts, end)
            spans = between(slices[first:last], begin - starts[first], end - starts[first])
            if spans:
                windows = {
                    window: windows.get(window) or submit(partial(self._read, window))
                    for window in dict.fromkeys(span.window for span in slices[first : last + 1])
                }
            sources = [(windows[span.window], span) for span in spans]
            yield partial(self._build, sources, end - begin - sum(map(len, spans)))

    def _read(self, window: Window) -> WindowRows:
        table = self.rows.read_window(window, self.shuffle_seed)
        return RowColumns.of(table), self.rows.row_order(window, self.shuffle_seed)

    def _build(
        self, sources: Sequence[tuple[Callable[[], WindowRows], Slice]], padding: int
    ) -> Batch:
        rows = []
        for window, span in sources:
            columns, order = window()
            rows.append(columns.take(order[span.begin : span.end]))
        if padding:
            rows.append(RowColumns.of(self.rows.padding(padding)).take(np.arange(padding)))
        return self.build(RowColumns.concat(rows))


def builder_threads(for_gpu: bool) -> int:
    """Return the number of threads for `num_workers: auto`: with a GPU, a rank's free cores."""
    if not for_gpu:
        return 1
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(cores - 2, 1), MAX_THREADS)  # two are for the step and the reader


def loader(
    interactions: Interactions, num_workers: int | Literal["auto"], pin_memory: bool
) -> Generator[Batch]:
    """Yield batches that `num_workers` threads build ahead; close it when stopping early."""
    if num_workers == "auto":
        num_workers = builder_threads(for_gpu=pin_memory)

    def pinned(job: Callable[[], Batch]) -> Batch:
        return job().pin_memory()

    def batches(read: Submit, build: Submit, ahead: int) -> Iterator[Batch]:
        jobs = interactions.jobs(read)
        if pin_memory:
            jobs = (partial(pinned, job) for job in jobs)
        return in_order(jobs, build, ahead)

    if not num_workers:
        yield from batches(cache, cache, 0)
        return
    # Stop the reader first: builders may block on it.
    with threads(num_workers, "build") as build, threads(1, "read") as read:
        yield from batches(read, build, AHEAD * num_workers)
