"""Impressions -> the batches of one rank, built ahead of the trainer.

All ranks get the same number of batches of the same sizes, as collectives require: row-wise tables
refuse unequal sizes, and a missing batch hangs the job. If the number of ranks does not divide the
rows, a rank with one row fewer adds a padding row, which has no weight in losses and metrics.

Shapes: R rows of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from recsys.data.batch import Batch
from recsys.data.batch_builder import BatchBuilder
from recsys.data.parquet.columns import RowColumns
from recsys.data.parquet.order import EpochShare, Stage, num_batches_of, rows_before
from recsys.data.prefetch import Later, Result, Submit, in_order, threads
from recsys.data.row_source import RowSource

AHEAD = 2  # batches in progress per building thread


@dataclass(frozen=True)
class WindowPart:
    """Rows of a batch: positions `[low, high)` of one slice of the share."""

    number: int  # number of the slice in the share
    low: int
    high: int


WindowRows = tuple[RowColumns, np.ndarray]  # a window that was read, and the order of its rows [R]


class Interactions:
    """Batches of one rank's share of a split.

    Args:
        rows: the split.
        build: turns a table into a `Batch`.
        batch_size: largest number of impressions per batch.
        rank, world_size: select the share.
        seed: shuffles, differently in each epoch; None keeps the order of the files.

    Raises:
        ValueError: there are fewer training rows than ranks.
    """

    def __init__(
        self,
        rows: RowSource,
        build: BatchBuilder,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
    ) -> None:
        """Check that every rank has a row, and start at epoch 0."""
        if seed is not None and rows.num_rows < world_size:
            raise ValueError(
                f"{rows.chunks[0].place}: {rows.num_rows} training rows cannot be shared by "
                f"{world_size} ranks; start fewer ranks"
            )
        self.rows, self.build, self.batch_size = rows, build, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.begin(0)

    def begin(self, epoch: int, stages: Sequence[Stage] = (), first_batch: int = 0) -> None:
        """Set the position at which the next iteration starts.

        Args:
            epoch: seeds the shuffle.
            stages: parts of this epoch already read by other numbers of ranks or batch sizes.
            first_batch: number of batches of the remaining rows already read by these ranks.
        """
        self.epoch, self.first_batch = epoch, first_batch
        self.shuffle_seed = None if self.seed is None else (self.seed, epoch)
        self.share = EpochShare.of(self.rows, stages, self.rank, self.world_size, self.shuffle_seed)
        self.num_batches = num_batches_of(self.share.num_rows, self.batch_size)

    def batches_until(self, part: int, parts: int) -> int:
        """Return the number of batches of this share in the first `part` of `parts` of an epoch."""
        left = self.rows.num_rows - self.share.rows_done
        if part == parts or not left:
            return self.num_batches
        wanted = self.rows.num_rows * part - self.share.rows_done * parts
        return max(0, wanted * self.num_batches // (left * parts))

    def __len__(self) -> int:
        """Return the number of batches left in the epoch."""
        return self.num_batches - self.first_batch

    def __iter__(self) -> Iterator[Batch]:
        """Return the remaining batches of the epoch, read and built in this thread; see `begin`."""
        return in_order(self.jobs(Later), Later, ahead=0)

    def jobs(self, submit: Submit) -> Iterator[Callable[[], Batch]]:
        """Yield one job per batch. A job waits for its windows, whose reading is submitted here.

        While a window is in use the next is being read, and no other is held in memory.
        """
        windows: dict[int, Result[WindowRows]] = {}
        for parts, padding in self._parts_of_batches():
            if parts:
                needed = range(parts[0].number, min(parts[-1].number + 2, len(self.share.slices)))
                windows = {
                    number: windows.get(number) or submit(partial(self._read, number))
                    for number in needed
                }
            sources = [(windows[part.number], part) for part in parts]
            yield partial(self._build, sources, padding)

    def _parts_of_batches(self) -> Iterator[tuple[list[WindowPart], int]]:
        """Yield the rows that each batch takes from each slice, and its number of padding rows."""
        done = rows_before(self.first_batch, self.share.num_rows, self.num_batches)
        slices = self.share.slices
        number = first = 0  # the next row's slice, and the position of its first row
        while number < len(slices) and first + len(slices[number]) <= done:
            first += len(slices[number])
            number += 1
        for batch in range(self.first_batch, self.num_batches):
            end = rows_before(batch + 1, self.share.num_rows, self.num_batches)
            parts = []
            while number < len(slices) and done < end:
                piece = slices[number]
                stop = min(end, first + len(piece))
                parts.append(WindowPart(number, piece.low + done - first, piece.low + stop - first))
                done = stop
                if done == first + len(piece):
                    first += len(piece)
                    number += 1
            yield parts, end - done
            done = end

    def _read(self, number: int) -> WindowRows:
        """Read one window and compute the order of its rows."""
        window = self.share.slices[number].window
        table = self.rows.read_window(window, self.shuffle_seed)
        return RowColumns.of(table), self.rows.row_order(window, self.shuffle_seed)

    def _build(
        self, sources: Sequence[tuple[Result[WindowRows], WindowPart]], padding: int
    ) -> Batch:
        """Build one batch from its parts of windows and padding rows."""
        rows = []
        for window, part in sources:
            columns, order = window.result()
            rows.append(columns.take(order[part.low : part.high]))
        if padding:
            rows.append(RowColumns.of(self.rows.padding(padding)).take(np.arange(padding)))
        return self.build(RowColumns.concat(rows))


def loader(interactions: Interactions, num_workers: int, pin_memory: bool) -> Generator[Batch]:
    """Yield the batches of `interactions`, in the same order for any number of threads.

    One thread reads the window after the one in use, `num_workers` threads build batches ahead;
    with 0 the calling thread does both on demand. An error is raised in place of the batch it
    concerns. Close the generator when stopping early, so that its threads end. `pin_memory` puts
    batches in page-locked memory, from which a GPU copies asynchronously.
    """
    if not num_workers:
        yield from _batches(interactions, Later, Later, 0, pin_memory)
        return
    # Stop the reader first: builders may block on it.
    with threads(num_workers, "build") as builders, threads(1, "read") as reader:
        ahead = AHEAD * num_workers
        yield from _batches(interactions, reader.submit, builders.submit, ahead, pin_memory)


def _batches(
    interactions: Interactions, read: Submit, build: Submit, ahead: int, pin_memory: bool
) -> Iterator[Batch]:
    """Return the built batches in order, pinned if required."""
    jobs = interactions.jobs(read)
    if pin_memory:
        jobs = (partial(_pinned, job) for job in jobs)
    return in_order(jobs, build, ahead)


def _pinned(job: Callable[[], Batch]) -> Batch:
    """Run a job and pin its batch."""
    return job().pin_memory()
