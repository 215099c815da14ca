"""Reads the files of a table as Arrow batches with canonical names and types.

A task is a row group of a Parquet file, or a CSV file. Each is read alone, so that engines may
read them anywhere, and every error names file and column.

Shapes: N rows of a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from recsys.data.events.files.columns import (
    Field,
    Parts,
    canonical,
    canonical_type,
    column_values,
    columns_in_files,
    without_views,
)
from recsys.data.events.files.csv_rows import check_columns, csv_batches, id_type, with_integers
from recsys.data.events.files.listing import data_files, partition_values
from recsys.data.events.files.narrow import columns_to_add, narrowed
from recsys.data.events.settings import EventTable, Source
from recsys.data.filesystem import Location
from recsys.data.parquet.file import READ_ERRORS, open_parquet

ROWS_PER_BATCH = 1 << 16
TEXTS = ("id", "text", "words")  # kinds that are texts in text files
FILE_BITS = 36  # a row's position is its file's number, shifted by this, and its row in the file

ReadTask = tuple[int, str, int, int]  # number of the file, its URL, row group (-1: all), first row


@dataclass(frozen=True)
class Reader:
    """Files of one table, read task by task; see `open_source`.

    Example::

        reader = open_source("events", source, fields)
        for task in reader.tasks:
            for batch in reader.read(task):
                ...
    """

    source: Source
    fields: list[Field]
    schema: pa.Schema  # position, then the fields
    tasks: list[ReadTask]
    roots: list[str]

    def read(self, task: ReadTask) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a task.

        Raises:
            ValueError: the file cannot be read, lacks a column, or has one of another type.
        """
        number, url, group, row = task
        file = Location.of(url)
        parts = partition_values(self.roots, url)
        for whole in self._batches(file, group, parts):
            batch, positions = _narrowed(whole, self.source, file, row, parts)
            batch = self._with_split_ids(batch, file)
            arrays = [pa.array((number << FILE_BITS) + positions)]
            for field, wanted in zip(self.fields, list(self.schema)[1:], strict=True):
                if field.kind == "missing":
                    arrays.append(pa.nulls(batch.num_rows, wanted.type))
                    continue
                values = column_values(batch, field, parts, wanted.type)
                arrays.append(canonical(values, field, self.source, wanted.type, file))
            yield pa.record_batch(arrays, schema=self.schema)
            row += whole.num_rows

    def _with_split_ids(self, batch: pa.RecordBatch, file: Location) -> pa.RecordBatch:
        """Return the rows with ids split from texts as integers, if the file's ids are integers."""
        if not isinstance(self.source, EventTable) or self.source.several is None:
            return batch
        name = self.source.item
        ids = [self.schema.field(of.name).type for of in self.fields if of.column == name]
        if not pa.types.is_string(batch.column(name).type) or pa.int64() not in ids:
            return batch
        try:
            return with_integers(batch, [name])
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file}: {error}") from error

    def completed(self, types: dict[str, pa.DataType]) -> Reader:
        """Return this reader with exactly the named columns; those it lacks are null.

        Raises:
            ValueError: a column has another type here.
        """
        own = {field.name: field for field in self.fields}
        for name, kind in types.items():
            if name in own and self.schema.field(name).type != kind:
                raise ValueError(
                    f"{self.tasks[0][1]}: column '{own[name].column}' has type "
                    f"{self.schema.field(name).type}, but {kind} in another table; write one type"
                )
        fields = [own.get(name, Field(name, "", "missing")) for name in types]
        schema = pa.schema([("position", pa.int64()), *types.items()])
        return replace(self, fields=fields, schema=schema)

    def _batches(self, file: Location, group: int, parts: Parts) -> Iterator[pa.RecordBatch]:
        """Yield rows as they are in the file."""
        columns = _columns_to_read(self.source, self.fields, parts)
        if group < 0:
            types = {
                field.column: wanted.type
                for field, wanted in zip(self.fields, list(self.schema)[1:], strict=True)
                if field.kind in (*TEXTS, "number") and field.column in columns
            }
            if isinstance(self.source, EventTable) and self.source.several is not None:
                del types[self.source.item]  # split first
            yield from csv_batches(file, self.source, columns, types)
            return
        with open_parquet(file) as parquet:
            check_columns(file, parquet.schema_arrow.names, columns)
            try:
                if columns:
                    batches = parquet.iter_batches(
                        ROWS_PER_BATCH, row_groups=[group], columns=columns
                    )
                    yield from map(without_views, batches)
            except READ_ERRORS as error:
                raise ValueError(
                    f"{file}: row group {group} cannot be read ({error}); write the file again"
                ) from error


def open_source(name: str, source: Source, fields: list[Field], first_file: int = 0) -> Reader:
    """List the files of a table and decide the types of its columns by the first file.

    Positions of rows count files from `first_file`, as those of all tables are counted together.

    Raises:
        ValueError: there is no file, or the first file cannot be read or lacks a column.
    """
    paths = [source.path] if isinstance(source.path, str) else source.path
    roots = [Location.of(path) for path in paths]
    files = [file for root in roots for file in data_files(name, root)]
    urls = Counter(map(str, files))
    if len(urls) < len(files):
        raise ValueError(
            f"{max(urls, key=urls.__getitem__)}: twice in the path of '{name}'; name it once"
        )
    tasks, filled, empty = list[ReadTask](), list[Location](), list[Location]()
    for number, file in enumerate(files, first_file):
        if not file.path.endswith(".parquet"):
            tasks.append((number, str(file), -1, 0))
            filled.append(file)
            continue
        first = 0
        with open_parquet(file) as parquet:
            for group in range(parquet.num_row_groups):
                tasks.append((number, str(file), group, first))
                first += parquet.metadata.row_group(group).num_rows
        (filled if first else empty).append(file)
    if not tasks:
        raise ValueError(f"{files[0]}: no rows; write the {name} into it")
    schema = _schema(source, fields, [str(root) for root in roots], [*filled, *empty])
    return Reader(source, fields, schema, tasks, [str(root) for root in roots])


def _columns_to_read(source: Source, fields: list[Field], parts: Parts) -> list[str]:
    """Return the columns of the files that fields and settings need."""
    columns = columns_in_files(fields, parts)
    if isinstance(source, EventTable):
        added = columns_to_add(source)
        columns += [name for name in source.where if name not in columns and name not in parts]
        columns = [name for name in columns if name not in added]
    return columns


def _narrowed(
    batch: pa.RecordBatch, source: Source, file: Location, row: int, parts: Parts
) -> tuple[pa.RecordBatch, np.ndarray]:
    """Return the rows to read of a batch that begins with this row of a file; see `narrowed`."""
    if isinstance(source, EventTable):
        return narrowed(batch, source, file, row, parts)
    return batch, np.arange(row, row + batch.num_rows)


def _schema(
    source: Source, fields: list[Field], roots: list[str], files: list[Location]
) -> pa.Schema:
    """Return the canonical types: of each column, by the first file that has a value of it."""
    found: dict[str, pa.DataType] = {}
    for file in files:
        for name, kind in _types(source, fields, roots, file).items():
            if name not in found or pa.types.is_null(found[name]):
                found[name] = kind
        if found and not any(map(pa.types.is_null, found.values())):
            break
    if not found:
        raise ValueError(f"{files[0]}: no rows; write some or remove the file")
    every = [partition_values(roots, str(file)) for file in files]
    for field in fields:
        texts = [parts[field.column] for parts in every if parts.get(field.column) is not None]
        if texts and field.kind in ("id", "any"):
            is_number = id_type(pa.array(texts)) == pa.int64()
            found[field.name] = pa.int64() if is_number else pa.string()
    types = {field.name: canonical_type(found[field.name], field, files[0]) for field in fields}
    return pa.schema([("position", pa.int64()), *types.items()])


def _types(
    source: Source, fields: list[Field], roots: list[str], file: Location
) -> dict[str, pa.DataType]:
    """Return the types of fields in one file; none if it is a text file without rows."""
    parts = partition_values(roots, str(file))
    columns = _columns_to_read(source, fields, parts)
    if file.path.endswith(".parquet"):
        with open_parquet(file) as parquet:
            check_columns(file, parquet.schema_arrow.names, columns)
            sample = parquet.schema_arrow.empty_table()
    else:
        texts = [of.column for of in fields if of.kind in TEXTS and of.column in columns]
        batch = next(csv_batches(file, source, columns, dict.fromkeys(texts, pa.string())), None)
        if batch is None:
            return {}
        sample = pa.Table.from_batches([batch])
    if isinstance(source, EventTable) and source.several is not None:
        rows = sample.to_batches() or [pa.RecordBatch.from_pylist([], schema=sample.schema)]
        sample = pa.Table.from_batches(
            [_narrowed(rows[0], replace(source, where={}), file, 0, parts)[0]]
        )
    types = {}
    for field in fields:
        if field.constant is not None or field.column in parts:
            types[field.name] = pa.float64() if field.kind == "number" else pa.string()
            continue
        kind = sample.schema.field(field.column).type
        if field.kind == "id" and not file.path.endswith(".parquet"):
            kind = id_type(sample[field.column].combine_chunks())
        types[field.name] = kind
        canonical_type(kind, field, file)
    return types
