"""Rows of a split as chunks, which ranks check and read in shares.

Chunks have one global order, shuffled by seed and epoch in training. A rank's share is a contiguous
range of it; shares differ by at most one row. Another number of ranks can resume an epoch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from recsys.config import SourceSettings
from recsys.config.named_parts import make_part
from recsys.data.parquet.bad_rows import BadRows, OnBadRow, no_row_left
from recsys.data.parquet.values import empty_table, padding_rows, usable_table
from recsys.data.schema import Schema
from recsys.data.transforms.columns import check_types, read_columns
from recsys.storage.location import Location
from recsys.storage.manifest import digest_of

if TYPE_CHECKING:
    from recsys.distributed.ranks import Ranks

SOURCES = {"parquet": "recsys.data.parquet.rows:split_rows"}

# Limits of a window, the rows that a rank shuffles together in memory; it has at least one chunk.
# Bytes of Parquet are of encoded pages; ids need about five times as much memory.
SHUFFLE_ROWS = 262_144
SHUFFLE_BYTES = 1 << 26


@dataclass(frozen=True)
class Chunk:
    """A range of rows that are read together."""

    place: str  # file, URL or name of the chunk
    num_rows: int
    first_row: int = 0  # number of the first row in `place`
    num_bytes: int = 0  # size, for the limit of windows; 0 if unknown
    digest: str = ""  # hash that changes with the content; empty if unknown


Window = range  # positions in the epoch's order whose rows are shuffled together


class RowSource(ABC):
    """Rows of one split. A subclass lists the chunks, in the order of their rows, and reads them.

    Without `with_labels`, rows need no labels. With `on_bad_row` skip, bad rows become padding.
    `recsys/training/README.md` has an example of a user-defined source.
    """

    def __init__(
        self,
        schema: Schema,
        chunks: Sequence[Chunk],
        with_labels: bool = True,
        on_bad_row: OnBadRow = "error",
    ) -> None:
        self.schema, self.chunks = schema, chunks
        self.bad_rows = BadRows(on_bad_row)
        self.names = columns_to_read(schema, with_labels)  # columns of the schema
        self.columns = schema.file_columns(self.names)  # columns of files that `names` need
        self._first_positions = [0, *accumulate(chunk.num_rows for chunk in chunks)]
        self.num_rows = self._first_positions.pop()
        self._cache: dict[int, pa.Table | None] = {}  # chunks to keep; None until they are read
        self.null_groups = 0  # differs between folders of training rows: see `usable_table`
        if not self.num_rows:
            raise ValueError(f"{type(self).__name__}: a split without rows; it needs some")

    @abstractmethod
    def read_chunk(self, number: int) -> pa.Table:
        """Return the rows of chunk `number`: at least the columns `self.columns`."""

    def read_chunks(self, numbers: Sequence[int]) -> Iterator[pa.Table]:
        """Yield the checked rows of these chunks; `numbers` are ascending."""
        for number in numbers:
            table, chunk = self.read_chunk(number), self.chunks[number]
            where, names = chunk.place, table.column_names
            for name in self.columns:
                if name not in names:
                    raise ValueError(f"{where}: column '{name}' is missing; the rows have {names}")
            kinds = dict(zip(names, table.schema.types, strict=True))
            check_types(self.schema, self.names, kinds.__getitem__, where)
            if table.num_rows != chunk.num_rows:
                raise ValueError(
                    f"{where}: {table.num_rows} rows instead of the {chunk.num_rows} of "
                    f"chunk {number}; a chunk has the same rows whenever it is read"
                )
            yield self.usable(number, table)

    def usable(self, number: int, table: pa.Table) -> pa.Table:
        """Return a chunk's rows in canonical types; report bad rows and replace them by padding."""
        chunk = self.chunks[number]

        def report(name: str, bad: np.ndarray, reason: str, message: Callable[[int], str]) -> None:
            prefix = "after its transform: " if name in self.schema.transforms else ""
            self.bad_rows.add(
                chunk.place, name, chunk.first_row, bad, reason, lambda row: prefix + message(row)
            )

        positions = np.arange(chunk.num_rows) + self._first_positions[number]
        columns = read_columns(table, self.schema, self.names, chunk.place)
        return usable_table(columns, self.schema, positions, report, self.null_groups)

    def describe_range(self, positions: np.ndarray) -> str:
        """Return the places of the first and the last of some rows [n] as text for messages."""
        if not len(positions):
            return "no rows"
        ends = []
        for position in (int(positions.min()), int(positions.max())):
            number = bisect_right(self._first_positions, position) - 1
            chunk, row = self.chunks[number], position - self._first_positions[number]
            ends.append(f"{chunk.place} row {chunk.first_row + row}")
        return " and ".join(ends)

    def fingerprint(self) -> str:
        """Return a hash of the rows' order, and after a dash a hash of chunk digests, if any."""
        names = [chunk.place.rsplit("/", 1)[-1] for chunk in self.chunks]
        sizes = [(chunk.num_rows, chunk.num_bytes) for chunk in self.chunks]
        digests = [chunk.digest for chunk in self.chunks]
        contents = [(names, sizes), *([digests] if any(digests) else [])]
        return "-".join(map(digest_of, contents))

    def skipped(self, ranks: Ranks, what: str) -> dict[str, Any]:
        """Return and print the rows skipped so far; a ValueError if all are. A collective."""
        summary = self.bad_rows.summary(ranks, what)
        if summary["rows"] == self.num_rows:
            raise no_row_left(self.num_rows, what, summary["found"])
        return summary

    def share(self, rank: int, world_size: int) -> tuple[int, int]:
        """Return the positions `(start, stop)` of a rank's rows in the global order."""
        return (self.num_rows * rank // world_size, self.num_rows * (rank + 1) // world_size)

    def windows(
        self, start: int, stop: int, shuffle_seed: tuple[int, int] | None = None
    ) -> list[Window]:
        """Split the positions `[start, stop)` into windows of chunks that are shuffled together.

        `shuffle_seed` (seed, epoch) permutes chunks, the same on all ranks, and rows of windows.
        """
        windows: list[Window] = []
        position, num_bytes = start, 0
        for number, begin, end in self._chunk_ranges(start, stop, shuffle_seed):
            chunk = self.chunks[number]
            size = chunk.num_bytes * (end - begin) // chunk.num_rows
            if num_bytes and size and num_bytes + size > SHUFFLE_BYTES:
                windows.append(Window(start, position))
                start, num_bytes = position, 0
            num_bytes += size
            position += end - begin
            if position - start >= SHUFFLE_ROWS or position == stop:
                windows.append(Window(start, position))
                start, num_bytes = position, 0
        return windows

    def keep(self, window: Window, shuffle_seed: tuple[int, int] | None = None) -> None:
        """Cache the chunks of a window from their next read on; drop other chunks."""
        ranges = self._chunk_ranges(window.start, window.stop, shuffle_seed)
        self._cache = dict.fromkeys(number for number, _, _ in ranges)

    def _chunks(self, numbers: Sequence[int]) -> Iterator[pa.Table]:
        read = self.read_chunks([number for number in numbers if self._cache.get(number) is None])
        for number in numbers:
            if (table := self._cache.get(number)) is None:
                table = next(read)
                if number in self._cache:
                    self._cache[number] = table
            yield table

    def read_window(self, window: Window, shuffle_seed: tuple[int, int] | None = None) -> pa.Table:
        """Return the rows of a window, in the order of its chunks; see `row_order`."""
        ranges = self._chunk_ranges(window.start, window.stop, shuffle_seed)
        numbers = sorted(number for number, _, _ in ranges)  # to open each file once
        tables = dict(zip(numbers, self._chunks(numbers), strict=True))
        return pa.concat_tables(
            tables[number].slice(begin, end - begin) for number, begin, end in ranges
        )

    def _chunk_ranges(
        self, start: int, stop: int, shuffle_seed: tuple[int, int] | None = None
    ) -> list[tuple[int, int, int]]:
        """Return (chunk, begin, end): rows [begin, end) of the chunk are in `[start, stop)`."""
        order: Sequence[int] = range(len(self.chunks))
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(len(order)).tolist()
        ranges, position = [], 0
        for number in order:
            num_rows = self.chunks[number].num_rows
            begin, end = max(start - position, 0), min(stop - position, num_rows)
            position += num_rows
            if begin < end:
                ranges.append((number, begin, end))
        return ranges

    def read_once(self, start: int, stop: int) -> Iterator[pa.Table]:
        """Yield the rows at positions `[start, stop)` chunk by chunk, without copying them."""
        ranges = self._chunk_ranges(start, stop)
        tables = self._chunks([number for number, _, _ in ranges])
        for table, (_, begin, end) in zip(tables, ranges, strict=True):
            yield table.slice(begin, end - begin)

    def row_order(self, window: Window, shuffle_seed: tuple[int, int] | None = None) -> np.ndarray:
        """Return the order in which the rows of a window are used: int64 [rows of the window]."""
        if shuffle_seed is None:
            return np.arange(len(window))
        return np.random.default_rng((*shuffle_seed, window.start)).permutation(len(window))

    def read(
        self, start: int, stop: int, shuffle_seed: tuple[int, int] | None = None
    ) -> Iterator[pa.Table]:
        """Yield the rows at positions `[start, stop)` in their order, one table per window."""
        for window in self.windows(start, stop, shuffle_seed):
            table = self.read_window(window, shuffle_seed)
            if shuffle_seed is not None:
                table = table.take(self.row_order(window, shuffle_seed))
            yield table.combine_chunks()

    def padding(self, num_rows: int) -> pa.Table:
        return padding_rows(empty_table(self.schema, self.names), num_rows)


def columns_to_read(schema: Schema, with_labels: bool) -> list[str]:
    """Return the columns to read; without labels, omit columns that only losses need."""
    omitted = () if with_labels else ("label", "extra", "weight", "sampled")
    columns = [name for name, column in schema.columns.items() if column.kind not in omitted]
    return columns + [name for history in schema.histories for name in history.numbers]


def open_rows(
    settings: SourceSettings,
    root: Location,
    split: str,
    schema: Schema,
    on_bad_row: OnBadRow = "error",
) -> RowSource:
    """Return the rows of a split from the source that the settings name."""
    kind: Any = RowSource  # Any, because mypy rejects an abstract class here
    rows: RowSource = make_part(
        "source.name", settings.name, SOURCES, kind, root, split, schema, **settings.options
    )
    rows.bad_rows = BadRows(on_bad_row)
    return rows


@dataclass(frozen=True)
class Stage:
    """The part of an epoch that a run with one number of ranks read: `batches` of each rank."""

    world_size: int
    batch_size: int
    batches: int


@dataclass(frozen=True)
class Slice:
    """Rows `[begin, end)` of a window, counted after the window's shuffle."""

    window: Window
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin


def between(slices: Sequence[Slice], begin: int, end: int) -> list[Slice]:
    """Return the rows at positions `[begin, end)` of the concatenated slices."""
    spans, position = [], 0
    for span in slices:
        first, last = max(begin - position, 0), min(end - position, len(span))
        if first < last:
            spans.append(Slice(span.window, span.begin + first, span.begin + last))
        position += len(span)
    return spans


def rank_shares(
    rows: RowSource, stages: Sequence[Stage], world_size: int, shuffle_seed: tuple[int, int] | None
) -> list[list[Slice]]:
    """Return each rank's share of the rows of an epoch that the `stages` have not read."""
    if not stages:
        ranges = [rows.share(rank, world_size) for rank in range(world_size)]
        by_rank = [rows.windows(start, stop, shuffle_seed) for start, stop in ranges]
        return [[Slice(window, 0, len(window)) for window in windows] for windows in by_rank]
    *earlier, last = stages
    shares = rank_shares(rows, earlier, last.world_size, shuffle_seed)
    largest = max(sum(map(len, share)) for share in shares)
    num_batches = max(-(-largest // last.batch_size), 1)  # as in `Interactions.begin`
    rows_read = largest * last.batches // num_batches
    remaining = [span for share in shares for span in between(share, rows_read, largest)]
    num_rows = sum(map(len, remaining))
    cuts = [num_rows * rank // world_size for rank in range(world_size + 1)]
    return [between(remaining, begin, end) for begin, end in pairwise(cuts)]
