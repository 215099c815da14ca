"""The rows of a split's Parquet files: counted, checked and read in each rank's share.

Row groups are the unit of reading. They are put in one global order (shuffled by seed and epoch
when training); a rank's share is a contiguous range of that order, so that every row belongs to
exactly one rank, each rank reads only the row groups it needs, and shares differ by one row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.filesystem import Location
from recsys.data.parquet.bad_rows import BadRows, OnBadRow
from recsys.data.parquet.file import READ_ERRORS, column_type, open_parquet
from recsys.data.parquet.values import (
    ROW_POSITION,
    check_type,
    empty_table,
    padding_rows,
    usable_table,
)
from recsys.data.schema import Schema
from recsys.distributed.ranks import Ranks

# What is shuffled together in memory, per rank: so many rows, or those of so many bytes where
# histories are long, but at least one row group. Bytes are those of encoded pages, as only these
# can be told of every file before it is read; ids take about five times as many in memory.
SHUFFLE_ROWS = 262_144
SHUFFLE_BYTES = 1 << 26


@dataclass(frozen=True)
class RowGroup:
    """One row group of one file."""

    file: Location
    index: int
    num_rows: int
    first_row: int  # within the file
    first_position: int  # within the split
    num_bytes: int  # of its pages, encoded but not compressed

    def bytes_in(self, low: int, high: int) -> int:
        """How many of them rows `[low, high)` have if all rows have equally many."""
        return self.num_bytes * (high - low) // self.num_rows


@dataclass(frozen=True)
class Window:
    """Places `[start, stop)` of the epoch's order of row groups; its rows are shuffled together."""

    start: int
    stop: int


class ParquetRows:
    """The rows of all `*.parquet` files of one split, or of the files given.

    Args:
        source: the files.
        schema: meaning of their columns.
        with_labels: False for files that need not have labels.
        on_bad_row: what becomes of a row with a value that cannot be used, or of a row group that
            cannot be read: `error`, or `skip`: padding rows stand in its place, and `bad_rows`
            counts them.

    Raises:
        ValueError: no file, an empty or unreadable file, a missing column or a wrong type.
    """

    def __init__(
        self,
        source: list[Location],
        schema: Schema,
        with_labels: bool = True,
        on_bad_row: OnBadRow = "error",
    ) -> None:
        self.schema = schema
        self.bad_rows = BadRows(on_bad_row)
        self.columns = [
            name
            for name, column in schema.columns.items()
            if with_labels or column.kind not in ("label", "extra")
        ] + schema.parallel
        self.row_groups: list[RowGroup] = []
        for file in source:
            self._add_file(file)
        self.num_rows = sum(group.num_rows for group in self.row_groups)

    @staticmethod
    def of_split(
        root: Location, split: str, schema: Schema, on_bad_row: OnBadRow = "error"
    ) -> ParquetRows:
        """The split `train`, `valid` or `test` of a dataset."""
        folder = root / split
        files = folder.files(".parquet")
        if not files:
            raise ValueError(f"{folder}: no *.parquet files; a dataset needs this split")
        return ParquetRows(files, schema, on_bad_row=on_bad_row)

    def _add_file(self, file: Location) -> None:
        with open_parquet(file) as parquet:
            metadata = parquet.metadata
            for name in self.columns:
                check_type(self.schema, name, column_type(parquet, file, name), file)
        if metadata.num_rows == 0:
            raise ValueError(f"{file}: the file has no rows; remove it or write it again")
        first_row = 0
        position = (
            self.row_groups[-1].first_position + self.row_groups[-1].num_rows
            if (self.row_groups)
            else 0
        )
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            place = (first_row, position + first_row)
            self.row_groups.append(
                RowGroup(file, index, group.num_rows, *place, group.total_byte_size)
            )
            first_row += group.num_rows

    def describe_range(self, positions: np.ndarray) -> str:
        """First and last of some rows, each as file and row, for messages."""
        if not len(positions):
            return "no rows"
        ends = [self._place(int(position)) for position in (positions.min(), positions.max())]
        return " and ".join(f"{group.file} row {row}" for group, row in ends)

    def _place(self, position: int) -> tuple[RowGroup, int]:
        """The row group that holds a place of the split, and the row in its file."""
        for group in self.row_groups:
            first = group.first_position
            if first <= position < first + group.num_rows:
                return group, group.first_row + position - first
        raise AssertionError("a place beyond the rows")

    def fingerprint(self) -> str:
        """A hash of what decides on the order of the rows: files, row groups and their sizes."""
        names = [str(group.file).rsplit("/", 1)[-1] for group in self.row_groups]
        sizes = [(group.num_rows, group.num_bytes) for group in self.row_groups]
        return hashlib.blake2b(repr((names, sizes)).encode(), digest_size=16).hexdigest()

    def skipped(self, ranks: Ranks, what: str) -> dict[str, Any]:
        """What all ranks have skipped of the row groups read so far; see `BadRows.summary`.

        Rank 0 prints it as the skipped rows of `what`. A collective.

        Raises:
            ValueError: no row is left.
        """
        summary = self.bad_rows.summary(ranks, what)
        if summary["rows"] == self.num_rows:
            raise ValueError(
                f"{self.row_groups[0].file}: none of the {self.num_rows} rows of {what} can be "
                "used; mend the data, or the schema"
            )
        return summary

    def share(self, rank: int, world_size: int) -> tuple[int, int]:
        """First and last-plus-one place of a rank's rows in the global order."""
        return (
            self.num_rows * rank // world_size,
            self.num_rows * (rank + 1) // world_size,
        )

    def windows(
        self, start: int, stop: int, shuffle_seed: tuple[int, int] | None = None
    ) -> list[Window]:
        """The places `[start, stop)` cut at row groups into what is shuffled together.

        A window ends with the row group that reaches `SHUFFLE_ROWS`, or before the one that would
        exceed `SHUFFLE_BYTES`. `shuffle_seed` (seed, epoch) permutes the row groups, the same on
        every rank, and the rows within each window.
        """
        found: list[Window] = []
        place = num_bytes = 0
        for group in self._ordered(shuffle_seed):
            low, high = max(start - place, 0), min(stop - place, group.num_rows)
            more = group.bytes_in(low, high) if low < high else 0
            if num_bytes and more and num_bytes + more > SHUFFLE_BYTES:
                found.append(Window(start, place))
                start, num_bytes = place, 0
            num_bytes += more
            place += group.num_rows
            if min(place, stop) - start >= SHUFFLE_ROWS or place >= stop > start:
                found.append(Window(start, min(place, stop)))
                start, num_bytes = found[-1].stop, 0
        return found

    def read_window(self, window: Window, shuffle_seed: tuple[int, int] | None = None) -> pa.Table:
        """The rows of a window, in the order of its row groups; see `row_order`.

        Raises:
            ValueError: a file is gone, or a row cannot be used and that is an error.
        """
        pieces: list[tuple[RowGroup, int, int, int]] = []  # row group, its place, rows [low, high)
        place = 0
        for group in self._ordered(shuffle_seed):
            low, high = max(window.start - place, 0), min(window.stop - place, group.num_rows)
            place += group.num_rows
            if low < high:
                pieces.append((group, len(pieces), low, high))
        tables: list[Any] = [None] * len(pieces)
        pieces.sort(key=lambda piece: piece[0].first_position)  # to open each file once
        for file, of_file in groupby(pieces, lambda piece: piece[0].file):
            with open_parquet(file) as parquet:
                for group, index, low, high in of_file:
                    tables[index] = self._read_group(parquet, group).slice(low, high - low)
        return pa.concat_tables(tables)

    def row_order(self, window: Window, shuffle_seed: tuple[int, int] | None = None) -> np.ndarray:
        """Which row of a window as it is read comes first, second and so on: int64 [rows]."""
        num_rows = window.stop - window.start
        if shuffle_seed is None:
            return np.arange(num_rows)
        return np.random.default_rng((*shuffle_seed, window.start)).permutation(num_rows)

    def read(
        self, start: int, stop: int, shuffle_seed: tuple[int, int] | None = None
    ) -> Iterator[pa.Table]:
        """The rows at the places `[start, stop)` in their order, one table per window."""
        for window in self.windows(start, stop, shuffle_seed):
            table = self.read_window(window, shuffle_seed)
            if shuffle_seed is not None:
                table = table.take(self.row_order(window, shuffle_seed))
            yield table.combine_chunks()

    def padding(self, num_rows: int) -> pa.Table:
        """Rows that count nowhere, in the types of those that are read."""
        return padding_rows(empty_table(self.schema, self.columns), num_rows)

    def _ordered(self, shuffle_seed: tuple[int, int] | None) -> list[RowGroup]:
        if shuffle_seed is None:
            return self.row_groups
        order = np.random.default_rng(shuffle_seed).permutation(len(self.row_groups))
        return [self.row_groups[index] for index in order]

    def _read_group(self, parquet: pq.ParquetFile, group: RowGroup) -> pa.Table:
        """The rows of a row group, those that cannot be used as padding rows."""
        try:
            table = parquet.read_row_group(group.index, columns=self.columns)
            if table.num_rows != group.num_rows:
                raise OSError(f"{table.num_rows} rows instead of {group.num_rows}")
        except READ_ERRORS as error:
            cause = str(error)
            self.bad_rows.add(
                group.file,
                "",
                group.first_row,
                np.ones(group.num_rows, bool),
                "row group that cannot be read",
                lambda row: (
                    f"row group {group.index} (rows from {group.first_row}) cannot be read "
                    f"({cause}); write the file again"
                ),
            )
            return self.padding(group.num_rows)

        def report(
            column: str, bad: np.ndarray, reason: str, message: Callable[[int], str]
        ) -> None:
            self.bad_rows.add(group.file, column, group.first_row, bad, reason, message)

        positions = np.arange(group.num_rows) + group.first_position
        return usable_table(table.select(self.columns), self.schema, positions, report)


def count_items(rows: ParquetRows, rank: int, world_size: int) -> np.ndarray:
    """How often each item is the target in a rank's share: int64 [num_items].

    All columns are read, so that a value that cannot be used ends a job before its first step.
    """
    counts = np.zeros(rows.schema.num_items, dtype=np.int64)
    target = rows.schema.target_item
    for table in rows.read(*rows.share(rank, world_size)):
        known = table[target].to_numpy()[table[ROW_POSITION].to_numpy() >= 0]
        # Not bincount, which would make another array of the whole table's length.
        items, times = np.unique(known, return_counts=True)
        counts[items] += times
    return counts
