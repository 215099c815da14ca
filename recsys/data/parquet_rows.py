"""The rows of a split's Parquet files: counted, checked and read in each rank's share.

Row groups are the unit of reading. They are put in one global order (shuffled by seed and epoch
when training); a rank's share is a contiguous range of that order, so that every row belongs to
exactly one rank, each rank reads only the row groups it needs, and shares differ by one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.data.filesystem import Location
from recsys.data.schema import Schema

SHUFFLE_ROWS = 262_144  # rows shuffled together in memory, per rank
ROW_POSITION = "__row_position"  # a row's place in the split's files, in order of file name


@dataclass(frozen=True)
class RowGroup:
    """One row group of one file."""

    file: Location
    index: int
    num_rows: int
    first_row: int  # within the file
    first_position: int  # within the split


@dataclass(frozen=True)
class Window:
    """Places `[start, stop)` of the epoch's order of row groups; its rows are shuffled together."""

    start: int
    stop: int


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists, of whatever flavour."""
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _expected(schema: Schema, name: str) -> tuple[bool, bool]:
    """(is a list, is an integer) of the column as the schema has it."""
    column = schema.columns.get(name)
    if column is None:  # a parallel list
        return True, False
    return column.kind in ("ids", "sequence"), column.kind in ("id", "ids", "sequence")


def _check_type(schema: Schema, name: str, kind: pa.DataType, file: Location) -> None:
    wants_list, wants_integer = _expected(schema, name)
    value = kind.value_type if is_list(kind) else kind
    fits = is_list(kind) == wants_list and (
        pa.types.is_integer(value) if wants_integer else _is_number(value)
    )
    if not fits:
        wanted = "integer" if wants_integer else "float"
        wanted = f"list<{wanted}>" if wants_list else wanted
        raise ValueError(
            f"{file}: column '{name}' has type {kind}, expected {wanted}; write it with that type "
            "or correct its kind in schema.yaml"
        )


class ParquetRows:
    """The rows of all `*.parquet` files of one split, or of the files given.

    Raises:
        ValueError: no file, an empty or unreadable file, a missing column or a wrong type.
    """

    def __init__(self, source: list[Location], schema: Schema, with_labels: bool = True) -> None:
        self.schema = schema
        self.columns = [
            name for name, column in schema.columns.items() if with_labels or column.kind != "label"
        ] + schema.parallel
        self.row_groups: list[RowGroup] = []
        for file in source:
            self._add_file(file)
        self.num_rows = sum(group.num_rows for group in self.row_groups)

    @staticmethod
    def of_split(root: Location, split: str, schema: Schema) -> ParquetRows:
        """The split `train`, `valid` or `test` of a dataset."""
        folder = root / split
        files = folder.files(".parquet")
        if not files:
            raise ValueError(f"{folder}: no *.parquet files; a dataset needs this split")
        return ParquetRows(files, schema)

    def _add_file(self, file: Location) -> None:
        if not file.exists():
            raise ValueError(f"{file}: no such file")
        try:
            with pq.ParquetFile(file.path, filesystem=file.arrow) as parquet:
                metadata, arrow_schema = parquet.metadata, parquet.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file}: not a readable Parquet file ({error})") from error
        if metadata.num_rows == 0:
            raise ValueError(f"{file}: the file has no rows; remove it or write it again")
        for name in self.columns:
            if name not in arrow_schema.names:
                raise ValueError(
                    f"{file}: column '{name}' is missing; the file has {arrow_schema.names}. "
                    "Write it or take it out of schema.yaml"
                )
            _check_type(self.schema, name, arrow_schema.field(name).type, file)
        first_row = 0
        position = (
            self.row_groups[-1].first_position + self.row_groups[-1].num_rows
            if (self.row_groups)
            else 0
        )
        for index in range(metadata.num_row_groups):
            num_rows = metadata.row_group(index).num_rows
            self.row_groups.append(RowGroup(file, index, num_rows, first_row, position + first_row))
            first_row += num_rows

    def share(self, rank: int, world_size: int) -> tuple[int, int]:
        """First and last-plus-one place of a rank's rows in the global order."""
        return (
            self.num_rows * rank // world_size,
            self.num_rows * (rank + 1) // world_size,
        )

    def windows(
        self, start: int, stop: int, shuffle_seed: tuple[int, int] | None = None
    ) -> list[Window]:
        """The places `[start, stop)` cut at row groups into windows of about `SHUFFLE_ROWS` rows.

        `shuffle_seed` (seed, epoch) permutes the row groups, the same on every rank, and the rows
        within each window.
        """
        found: list[Window] = []
        place = 0
        for group in self._ordered(shuffle_seed):
            place += group.num_rows
            if min(place, stop) - start >= SHUFFLE_ROWS or place >= stop > start:
                found.append(Window(start, min(place, stop)))
                start = found[-1].stop
        return found

    def read_window(self, window: Window, shuffle_seed: tuple[int, int] | None = None) -> pa.Table:
        """The rows of a window, in their shuffled order, in one chunk per column."""
        tables, place = [], 0
        for group in self._ordered(shuffle_seed):
            low, high = max(window.start - place, 0), min(window.stop - place, group.num_rows)
            place += group.num_rows
            if low < high:
                tables.append(self._read_group(group).slice(low, high - low))
        table = pa.concat_tables(tables)
        if shuffle_seed is not None:
            rng = np.random.default_rng((*shuffle_seed, window.start))
            table = table.take(pa.array(rng.permutation(table.num_rows)))
        return table.combine_chunks()

    def read(
        self, start: int, stop: int, shuffle_seed: tuple[int, int] | None = None
    ) -> Iterator[pa.Table]:
        """Tables of about `SHUFFLE_ROWS` rows with the places `[start, stop)`; see `windows`."""
        for window in self.windows(start, stop, shuffle_seed):
            yield self.read_window(window, shuffle_seed)

    def _ordered(self, shuffle_seed: tuple[int, int] | None) -> list[RowGroup]:
        if shuffle_seed is None:
            return self.row_groups
        order = np.random.default_rng(shuffle_seed).permutation(len(self.row_groups))
        return [self.row_groups[index] for index in order]

    def _read_group(self, group: RowGroup) -> pa.Table:
        try:
            with pq.ParquetFile(group.file.path, filesystem=group.file.arrow) as parquet:
                table = parquet.read_row_group(group.index, columns=self.columns)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{group.file}: row group {group.index} (rows from {group.first_row}) cannot be "
                f"read ({error}); write the file again"
            ) from error
        arrays = [self._checked(table, name, group) for name in self.columns]
        arrays.append(pa.array(np.arange(group.num_rows) + group.first_position))
        table = pa.table(dict(zip([*self.columns, ROW_POSITION], arrays, strict=True)))
        self._check_parallel(table, group)
        return table

    def _checked(self, table: pa.Table, name: str, group: RowGroup) -> pa.Array:
        """The column in its canonical type, its values checked."""
        is_list_column, is_integer = _expected(self.schema, name)
        array = table[name].combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = pa.concat_arrays(array.chunks)
        where = f"{group.file}: column '{name}'"
        if not is_list_column and array.null_count:
            row = group.first_row + int(np.flatnonzero(array.is_null().to_numpy(False))[0])
            raise ValueError(f"{where}, row {row}: null; fill it or drop the row")
        # Ids are checked as they were written, since a large unsigned one would turn negative.
        own_type = array.type.value_type if is_list_column else array.type
        array = _cast(array, own_type if is_integer else pa.float32(), is_list_column)
        values = array.flatten() if is_list_column else array
        bad, reason = self._bad_value(name, values, is_integer)
        if bad is not None:
            row = bad
            if is_list_column:
                row = int(np.repeat(np.arange(len(array)), list_lengths(array))[bad])
            raise ValueError(f"{where}, row {group.first_row + row}: {reason}")
        return _cast(array, pa.int64(), is_list_column) if is_integer else array

    def _bad_value(self, name: str, values: pa.Array, is_integer: bool) -> tuple[int | None, str]:
        """Index of the first value that cannot be used, and why."""
        if values.null_count:
            index = int(np.flatnonzero(values.is_null().to_numpy(False))[0])
            return index, "null inside the list; fill it or leave it out"
        numbers = values.to_numpy(zero_copy_only=False)
        if not is_integer:
            wrong = ~np.isfinite(numbers)
            mend = "write a finite number that fits float32"
        else:
            limit = self.schema.limit(name)
            wrong = (numbers < 0) | (numbers >= limit)
            table = self.schema.table_of(name)
            mend = f"raise num_embeddings of '{table}' in schema.yaml or map the ids to rows"
        if not wrong.any():
            return None, ""
        index = int(wrong.argmax())
        if not is_integer:
            return index, f"value {numbers[index]}; {mend}"
        return index, f"id {numbers[index]} is outside [0, {limit}); {mend}"

    def _check_parallel(self, table: pa.Table, group: RowGroup) -> None:
        if self.schema.history is None:
            return
        lengths = list_lengths(table[self.schema.history])
        for name in self.schema.parallel:
            wrong = list_lengths(table[name]) != lengths
            if wrong.any():
                row = int(wrong.argmax())
                raise ValueError(
                    f"{group.file}: column '{name}', row {group.first_row + row}: the list has "
                    f"another length than '{self.schema.history}' ({lengths[row]} items); write "
                    "one value per item"
                )


def _cast(array: pa.Array, value_type: pa.DataType, as_list: bool) -> pa.Array:
    return array.cast(pa.list_(value_type) if as_list else value_type, safe=False)


def list_lengths(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Lengths of the lists; a null list is an empty one."""
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    return lengths.to_numpy() if isinstance(lengths, pa.ChunkedArray) else lengths.to_numpy(False)


def padding_rows(like: pa.Table, num_rows: int) -> pa.Table:
    """Rows that take part in a step and count nowhere: zeros, empty lists, position -1."""
    columns = {}
    for field in like.schema:
        value: Any = [] if is_list(field.type) else -1 if field.name == ROW_POSITION else 0
        columns[field.name] = pa.array([value] * num_rows, field.type)
    return pa.table(columns, schema=like.schema)


def count_items(rows: ParquetRows, rank: int, world_size: int) -> np.ndarray:
    """How often each item is the target in a rank's share: int64 [num_items].

    All columns are read, so that a value that cannot be used ends a job before its first step.
    """
    counts = np.zeros(rows.schema.num_items, dtype=np.int64)
    target = rows.schema.target_item
    for table in rows.read(*rows.share(rank, world_size)):
        counts += np.bincount(table[target].to_numpy(), minlength=len(counts))
    return counts
