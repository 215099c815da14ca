"""Rows of a split as chunks that are counted, checked and read in shares.

Chunks are the unit of reading: row groups of Parquet files, or units that your own source
defines. They have one global order (shuffled by seed and epoch in training); a rank's
share is a contiguous range of that order, so that every row belongs to exactly one rank, each rank
reads only the chunks it needs, and shares differ by at most one row.

Your own source is a class in one file and a line of YAML. It counts the rows of each chunk
and reads a chunk; this module does the rest, including the check of every value:

    class CsvRows(RowSource):
        def __init__(self, root: Location, split: str, schema: Schema, sep: str = ",") -> None:
            self.files = sorted(Path(root.path, split).glob("*.csv"))
            super().__init__(schema, [Chunk(str(f), count_lines(f)) for f in self.files])

        def read_chunk(self, number: int) -> pa.Table: ...  # the columns `self.columns`

    source: {name: "my_rows:CsvRows", options: {sep: ";"}}
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from recsys.config import SourceSettings
from recsys.config.named_parts import make_part
from recsys.data.chunk import Chunk as Chunk
from recsys.data.chunk import fingerprint_of
from recsys.data.filesystem import Location
from recsys.data.parquet.bad_rows import BadRows, OnBadRow, no_row_left
from recsys.data.parquet.values import empty_table, padding_rows, usable_table
from recsys.data.schema import Schema
from recsys.data.transforms.columns import check_types, read_columns

if TYPE_CHECKING:
    from recsys.distributed.ranks import Ranks

SOURCES = {"parquet": "recsys.data.parquet.rows:split_rows"}

# Limits of a window, the rows that a rank shuffles together in memory: a number of rows, or of
# # bytes if histories are long, but at least one chunk. For Parquet this is the size of encoded
# # pages, the only size known before reading; ids need about five times as much memory.
SHUFFLE_ROWS = 262_144
SHUFFLE_BYTES = 1 << 26


@dataclass(frozen=True)
class Window:
    """Positions `[start, stop)` of the epoch's order; their rows are shuffled together."""

    start: int
    stop: int


class RowSource(ABC):
    """Rows of one split. Subclasses define its chunks, and read them.

    Args:
        schema: meaning of the columns.
        chunks: in the order of their rows.
        with_labels: False for rows that need not have labels.
        on_bad_row: treatment of a row with an unusable value: `error` raises; `skip` replaces it by
            a padding row, which `bad_rows` counts.

    Raises:
        ValueError: there are no rows.
    """

    def __init__(
        self,
        schema: Schema,
        chunks: Sequence[Chunk],
        with_labels: bool = True,
        on_bad_row: OnBadRow = "error",
    ) -> None:
        """Keep the chunks and locate the first row of each."""
        self.schema, self.chunks = schema, chunks
        self.bad_rows = BadRows(on_bad_row)
        self.names = columns_to_read(schema, with_labels)  # columns of the schema
        self.columns = schema.file_columns(self.names)  # from which they are read
        # Position of each chunk's first row in the split.
        self._first_positions = [0, *accumulate(chunk.num_rows for chunk in chunks)]
        self.num_rows = self._first_positions.pop()
        if not self.num_rows:
            raise ValueError(f"{type(self).__name__}: a split without rows; it needs some")

    @abstractmethod
    def read_chunk(self, number: int) -> pa.Table:
        """Return the rows of chunk `number`: at least the columns `self.columns`."""

    def read_chunks(self, numbers: Sequence[int]) -> Iterator[pa.Table]:
        """Yield the checked rows of some chunks, given in ascending order."""
        for number in numbers:
            table, chunk = self.read_chunk(number), self.chunks[number]
            for name in self.columns:
                if name not in table.column_names:
                    raise ValueError(
                        f"{chunk.place}: column '{name}' is missing; the rows have "
                        f"{table.column_names}"
                    )
            kinds = dict(zip(table.column_names, table.schema.types, strict=True))
            check_types(self.schema, self.names, kinds.__getitem__, chunk.place)
            if table.num_rows != chunk.num_rows:
                raise ValueError(
                    f"{chunk.place}: {table.num_rows} rows instead of the {chunk.num_rows} of "
                    f"chunk {number}; a chunk has the same rows whenever it is read"
                )
            yield self.usable(number, table)

    def usable(self, number: int, table: pa.Table) -> pa.Table:
        """Return a chunk's rows in canonical types; bad rows are reported and become padding rows.

        Raises:
            ValueError: a row is bad and `on_bad_row` is error.
        """
        chunk = self.chunks[number]

        def report(
            column: str, bad: np.ndarray, reason: str, message: Callable[[int], str]
        ) -> None:
            after = "after its transform: " if column in self.schema.transforms else ""
            self.bad_rows.add(
                chunk.place, column, chunk.first_row, bad, reason, lambda row: after + message(row)
            )

        positions = np.arange(chunk.num_rows) + self._first_positions[number]
        columns = read_columns(table, self.schema, self.names, chunk.place)
        return usable_table(columns, self.schema, positions, report)

    def describe_range(self, positions: np.ndarray) -> str:
        """Describe the positions of the first and last of some rows [n] for messages."""
        if not len(positions):
            return "no rows"
        ends = [self._place(int(position)) for position in (positions.min(), positions.max())]
        return " and ".join(f"{place} row {row}" for place, row in ends)

    def _place(self, position: int) -> tuple[str, int]:
        """Return the chunk's place of a row of the split, and the row's number in it."""
        number = bisect_right(self._first_positions, position) - 1
        chunk = self.chunks[number]
        return chunk.place, chunk.first_row + position - self._first_positions[number]

    def fingerprint(self) -> str:
        """Return hashes of the order of the rows and of their content; see `fingerprint_of`."""
        return fingerprint_of(self.chunks)

    def skipped(self, ranks: Ranks, what: str) -> dict[str, Any]:
        """Return the rows that all ranks have skipped so far; see `BadRows.summary`.

        Rank 0 logs it as the skipped rows of `what`. A collective.

        Raises:
            ValueError: no row is left.
        """
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
        """Split the positions `[start, stop)` at chunks into windows that are shuffled together.

        A window ends with the chunk that reaches `SHUFFLE_ROWS`, or before the one that exceeds
        `SHUFFLE_BYTES`. `shuffle_seed` (seed, epoch) permutes the chunks, the same on
        every rank, and the rows within each window.
        """
        found: list[Window] = []
        place = num_bytes = 0
        for number in self._ordered(shuffle_seed):
            chunk = self.chunks[number]
            low, high = max(start - place, 0), min(stop - place, chunk.num_rows)
            more = chunk.num_bytes * (high - low) // chunk.num_rows if low < high else 0
            if num_bytes and more and num_bytes + more > SHUFFLE_BYTES:
                found.append(Window(start, place))
                start, num_bytes = place, 0
            num_bytes += more
            place += chunk.num_rows
            if min(place, stop) - start >= SHUFFLE_ROWS or place >= stop > start:
                found.append(Window(start, min(place, stop)))
                start, num_bytes = found[-1].stop, 0
        return found

    def read_window(self, window: Window, shuffle_seed: tuple[int, int] | None = None) -> pa.Table:
        """Return the rows of a window, in the order of its chunks; see `row_order`.

        Raises:
            ValueError: a file is missing, or a row is bad and `on_bad_row` is error.
        """
        pieces: list[tuple[int, int, int]] = []  # a chunk and its rows [low, high)
        place = 0
        for number in self._ordered(shuffle_seed):
            num_rows = self.chunks[number].num_rows
            low, high = max(window.start - place, 0), min(window.stop - place, num_rows)
            place += num_rows
            if low < high:
                pieces.append((number, low, high))
        numbers = sorted(number for number, _, _ in pieces)  # to open each file once
        tables = dict(zip(numbers, self.read_chunks(numbers), strict=True))
        return pa.concat_tables(
            [tables[number].slice(low, high - low) for number, low, high in pieces]
        )

    def row_order(self, window: Window, shuffle_seed: tuple[int, int] | None = None) -> np.ndarray:
        """Return the order in which the rows of a window are used: int64 [rows of the window]."""
        num_rows = window.stop - window.start
        if shuffle_seed is None:
            return np.arange(num_rows)
        return np.random.default_rng((*shuffle_seed, window.start)).permutation(num_rows)

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
        """Return padding rows, in the types of the rows that are read."""
        return padding_rows(empty_table(self.schema, self.names), num_rows)

    def _ordered(self, shuffle_seed: tuple[int, int] | None) -> Sequence[int]:
        if shuffle_seed is None:
            return range(len(self.chunks))
        order = np.random.default_rng(shuffle_seed).permutation(len(self.chunks))
        return [int(number) for number in order]


def columns_to_read(schema: Schema, with_labels: bool) -> list[str]:
    """Return the columns of the rows; without labels, columns that only losses need are omitted."""
    columns = [
        name
        for name, column in schema.columns.items()
        if with_labels or column.kind not in ("label", "extra", "weight", "sampled")
    ]
    return columns + [name for history in schema.histories for name in history.numbers]


def open_rows(
    settings: SourceSettings,
    root: Location,
    split: str,
    schema: Schema,
    on_bad_row: OnBadRow = "error",
) -> RowSource:
    """Return the rows of a split, from the source that the settings name.

    Raises:
        ValueError: the source cannot be built, or cannot read the split.
    """
    rows: RowSource = make_part(
        "source.name",
        settings.name,
        SOURCES,
        RowSource,  # type: ignore[type-abstract]
        root,
        split,
        schema,
        **settings.options,
    )
    rows.bad_rows = BadRows(on_bad_row)
    return rows
