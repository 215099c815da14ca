"""Read the files of a table as Arrow batches with canonical names and types.

Shapes: N rows of a batch, M rows after the selection and split of items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.data.events.file_columns import (
    Field,
    Hive,
    Types,
    canonical,
    canonical_type,
    check_columns,
    column_values,
    csv_batches,
    data_files,
    fixed_folder,
    id_type,
    partition_values,
    with_integers,
    without_views,
)
from recsys.data.events.settings import EventTable, Several, Source, Value
from recsys.data.events.times import first_row, is_text
from recsys.data.parquet.file import READ_ERRORS, open_parquet
from recsys.data.parquet.values import is_list, list_lengths
from recsys.storage.location import Location

ROWS_PER_BATCH = 1 << 16
TEXTS = ("id", "text", "words")  # kinds that are texts in text files
FILE_BITS = 36  # a row's position is its file's number, shifted by this, and its row in the file
ITEM_BITS = 12  # bits of a position for the item's number in its row, if rows hold several items
MAX_ITEMS, MAX_ROWS = 1 << ITEM_BITS, 1 << 24  # items of a row, and rows of a file

# A row group of a Parquet file, or a text file: its number, URL, row group (-1: all) and first row.
ReadTask = tuple[int, str, int, int]


class NoRows(ValueError):
    """Raised if the files of a table have no row."""


@dataclass(frozen=True)
class Reader:
    """Files of one table, read task by task; see `open_source`."""

    source: Source
    fields: list[Field]
    schema: pa.Schema  # position, then the fields
    untyped: set[str]  # fields without any value, which get their types from other tables
    tasks: list[ReadTask]
    roots: list[str]

    def read(self, task: ReadTask) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a task; a file or column that cannot be read is a ValueError."""
        number, url, group, first_row = task
        file = Location.of(url)
        hive = partition_values(self.roots, url)
        for batch in self._batches(file, group, hive):
            rows, positions = selected_rows(batch, self.source, file, first_row, hive)
            rows = self._with_split_ids(rows, file)
            arrays = [pa.array((number << FILE_BITS) + positions)]
            has_several = isinstance(self.source, EventTable) and self.source.several is not None
            file_rows = positions >> ITEM_BITS if has_several else positions
            for field, kind in zip(self.fields, self.schema.types[1:], strict=True):
                if field.kind == "missing":
                    arrays.append(pa.nulls(rows.num_rows, kind))
                    continue
                has_form = field.kind == "time" and self.source.time_format is not None
                values = column_values(rows, field, hive, pa.string() if has_form else kind)
                arrays.append(canonical(values, field, self.source, kind, file, file_rows))
            yield pa.record_batch(arrays, schema=self.schema)
            first_row += batch.num_rows

    def _with_split_ids(self, batch: pa.RecordBatch, file: Location) -> pa.RecordBatch:
        """Return the rows with split ids as integers if the table's ids are integers."""
        if not isinstance(self.source, EventTable) or self.source.several is None:
            return batch
        name = self.source.item
        ids = [self.schema.field(field.name).type for field in self.fields if field.column == name]
        if not pa.types.is_string(batch.column(name).type) or pa.int64() not in ids:
            return batch
        try:
            return with_integers(batch, [name])
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file}: {error}") from error

    def completed(self, types: Types) -> Reader:
        """Return a reader of columns `types`, null where missing; a ValueError for another type."""
        fields = {field.name: field for field in self.fields}
        for name, field in fields.items():
            if (kind := self.schema.field(name).type) != types[name] and name not in self.untyped:
                raise ValueError(
                    f"{self.tasks[0][1]}: column '{field.column}' has type {kind}, but "
                    f"{types[name]} in another table or an earlier call, where ids without a value "
                    "and a type count as strings; write one type, or prepare into another --out"
                )
        all_fields = [fields.get(name, Field(name, "", "missing")) for name in types]
        schema = pa.schema([("position", pa.int64()), *types.items()])
        return replace(self, fields=all_fields, schema=schema)

    def _batches(self, file: Location, group: int, hive: Hive) -> Iterator[pa.RecordBatch]:
        columns = _columns_to_read(self.source, self.fields, hive)
        if group < 0:
            types = {
                field.column: kind
                for field, kind in zip(self.fields, self.schema.types[1:], strict=True)
                if field.kind in (*TEXTS, "number") and field.column in columns
            } | _texts_of_times(self.source, self.fields, columns)
            if isinstance(self.source, EventTable) and self.source.several is not None:
                del types[self.source.item]  # it is text until items are split
            yield from csv_batches(file, self.source, columns, types)
            return
        with open_parquet(file) as parquet:
            check_columns(file, parquet.schema_arrow.names, columns)
            try:
                if columns:
                    batches = parquet.iter_batches(ROWS_PER_BATCH, [group], columns)
                    yield from map(without_views, batches)
            except READ_ERRORS as error:
                problem = f"row group {group} cannot be read ({error})"
                raise ValueError(f"{file}: {problem}; write the file again") from error


def file_sizes(name: str, source: Source, may_be_empty: bool) -> dict[str, tuple[str, int]]:
    """Return URL and bytes of each file of a table, by its name relative to the table's paths."""
    sizes = {}
    for number, root in enumerate(map(Location.of, source.path)):
        root.filesystem.invalidate_cache()  # fsspec caches lists of files in object stores
        folder = fixed_folder(root)
        for file in data_files(name, root, may_be_empty):
            below = file.path[len(folder.path) :] or f"/{file.path.rsplit('/', 1)[-1]}"
            with suppress(FileNotFoundError):  # the file was removed after it was listed
                sizes[f"{number}{below}"] = str(file), int(file.filesystem.size(file.path))
    return sizes


def open_source(
    name: str, source: Source, fields: list[Field], first_file: int = 0, only: Collection[str] = ()
) -> Reader:
    """List the files of a table, or only those in `only`; return a reader with column types.

    Positions of rows count files from `first_file`. No file, or a first file that cannot be read or
    lacks a column, is a ValueError.
    """
    roots = [Location.of(path) for path in source.path]  # loading has made `path` a list
    files = [file for root in roots for file in data_files(name, root, bool(only))]
    urls = Counter(map(str, files))
    if len(urls) < len(files):
        ((url, _),) = urls.most_common(1)
        raise ValueError(f"{url}: twice in the path of '{name}'; name it once")
    tasks, filled, empty = list[ReadTask](), list[Location](), list[Location]()
    if only:
        files = [file for file in files if str(file) in only]
    for number, file in enumerate(files, first_file):
        if not file.path.endswith(".parquet"):
            tasks.append((number, str(file), -1, 0))
            filled.append(file)
            continue
        first_row = 0
        with open_parquet(file) as parquet:
            for group in range(parquet.num_row_groups):
                tasks.append((number, str(file), group, first_row))
                first_row += parquet.metadata.row_group(group).num_rows
        (filled if first_row else empty).append(file)
    if not tasks:
        raise NoRows(f"{files[0]}: no rows; write the {name} into it")
    folders = [str(fixed_folder(root)) for root in roots]
    schema, untyped = _schema(source, fields, folders, [*filled, *empty])
    return Reader(source, fields, schema, untyped, tasks, folders)


def _columns_to_read(source: Source, fields: list[Field], hive: Hive) -> list[str]:
    names = [field.column for field in fields if field.constant is None and field.kind != "missing"]
    split_column = None
    if isinstance(source, EventTable):
        names += source.where
        split_column = source.several.column if source.several is not None else None
    return [name for name in dict.fromkeys(names) if name not in hive and name != split_column]


def _texts_of_times(source: Source, fields: list[Field], columns: list[str]) -> Types:
    """Return type string for times of a `time_format`, which might be read as numbers or dates."""
    names = [field.column for field in fields if field.kind == "time" and source.time_format]
    return {name: pa.string() for name in names if name in columns}


def _schema(
    source: Source, fields: list[Field], roots: list[str], files: list[Location]
) -> tuple[pa.Schema, set[str]]:
    """Return canonical types, each from the first file with a value, and fields without a value."""
    types: Types = {}
    for file in files:
        for name, kind in _types(source, fields, roots, file).items():
            if name not in types or _is_untyped(types[name]):
                types[name] = kind
        if types and not any(map(_is_untyped, types.values())):
            break
    if not types:
        raise NoRows(f"{files[0]}: no rows; write some or remove the file")
    hive_by_file = [partition_values(roots, str(file)) for file in files]
    for field in fields:
        texts = {hive.get(field.column) for hive in hive_by_file} - {None}
        if texts and field.kind in ("id", "any"):
            is_number = id_type(pa.array(list(texts))) == pa.int64()
            types[field.name] = pa.int64() if is_number else pa.string()
    kinds = {field.name: canonical_type(types[field.name], field, files[0]) for field in fields}
    untyped = {name for name, kind in types.items() if _is_untyped(kind)}
    return pa.schema([("position", pa.int64()), *kinds.items()]), untyped


def _is_untyped(kind: pa.DataType) -> bool:
    return pa.types.is_null(kind.value_type if is_list(kind) else kind)


def _types(source: Source, fields: list[Field], roots: list[str], file: Location) -> Types:
    """Return the types of fields in one file; empty for a text file without rows."""
    hive = partition_values(roots, str(file))
    columns = _columns_to_read(source, fields, hive)
    is_parquet = file.path.endswith(".parquet")
    if is_parquet:
        with open_parquet(file) as parquet:
            check_columns(file, parquet.schema_arrow.names, columns)
            sample = pa.RecordBatch.from_pylist([], schema=parquet.schema_arrow)
    else:
        texts = [field.column for field in fields if field.kind in TEXTS]
        text_types = {name: pa.string() for name in texts if name in columns}
        text_types |= _texts_of_times(source, fields, columns)
        first_batch = next(csv_batches(file, source, columns, text_types), None)
        if first_batch is None:
            return {}
        sample = first_batch
    if isinstance(source, EventTable) and source.several is not None:
        sample = selected_rows(sample, replace(source, where={}), file, 0, hive)[0]
    types = {}
    for field in fields:
        if field.constant is not None or field.column in hive:
            types[field.name] = pa.float64() if field.kind == "number" else pa.string()
            continue
        kind = sample.schema.field(field.column).type
        if field.kind == "id" and not is_parquet:
            kind = id_type(sample.column(field.column))
        types[field.name] = kind
        canonical_type(kind, field, file)
    return types


def selected_rows(
    batch: pa.RecordBatch, source: Source, file: Location, first_row: int, hive: Hive
) -> tuple[pa.RecordBatch, np.ndarray]:  # batch [N] -> [M], int64 [M]
    """Return the rows that `where` selects, each with one item, and their positions in the file.

    `first_row` is the batch's first row, `hive` are values of the file's folders. A column that
    cannot be split, or whose type differs from the values in `where`, is a ValueError.
    """
    positions = np.arange(first_row, first_row + batch.num_rows)
    if not isinstance(source, EventTable):
        return batch, positions
    if source.several is not None:
        batch, positions = _split(batch, source.item, source.several, file, positions)
    for name, values in source.where.items():
        values = values if isinstance(values, list) else [values]
        is_selected = _has_value(batch, name, values, hive, file)
        batch = batch.filter(is_selected)
        positions = positions[np.asarray(is_selected)]
    return batch, positions


def _has_value(
    batch: pa.RecordBatch, name: str, values: list[Value], hive: Hive, file: Location
) -> pa.Array:  # bool [N]
    """Return which rows have one of `values` in a column; another type is a ValueError."""
    kind = None
    try:
        allowed = pa.array(values)
        column = column_values(batch, Field(name, name, "any"), hive, allowed.type)
        column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        kind = column.type
        if pa.types.is_null(kind):  # a column without any value
            return pc.is_valid(column)
        cast = allowed.cast(kind)
        if pa.types.is_boolean(kind) and not cast.cast(allowed.type).equals(allowed):
            raise TypeError("a number other than 0 and 1")  # the cast would make it true
        return pc.is_in(column, cast)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        types = "values of one type" if kind is None else f"type {kind}"
        raise ValueError(
            f"{file}: column '{name}' has {types}, but `where` the values {values}; write values "
            "of that type"
        ) from error


def _split(
    batch: pa.RecordBatch, item: str, several: Several, file: Location, rows: np.ndarray
) -> tuple[pa.RecordBatch, np.ndarray]:
    lists = batch.column(item)
    where = f"{file}: column '{item}'"
    if pa.types.is_null(lists.type):
        lists = lists.cast(pa.string())
    if is_text(lists.type):
        lists = _item_lists(lists, several.between)
    elif not is_list(lists.type):
        raise ValueError(f"{where} has type {lists.type}; `several` needs texts or lists")
    lengths = list_lengths(lists)
    counts = np.maximum(lengths, 1)  # a row without items remains, with a null item
    parents = np.repeat(np.arange(len(lists)), counts)
    item_numbers = np.arange(len(parents)) - np.repeat(np.cumsum(counts) - counts, counts)
    if len(parents) and (item_numbers.max() >= MAX_ITEMS or rows.max() >= MAX_ROWS):
        raise ValueError(
            f"{where}: a row has at most {MAX_ITEMS} items, and a file at most {MAX_ROWS} rows; "
            "write more rows, or more files"
        )
    is_item = pa.array(lengths[parents] > 0)
    item_indices = pc.if_else(is_item, pa.array(np.cumsum(np.asarray(is_item)) - 1), None)
    items = pc.list_flatten(lists).take(item_indices)
    columns = dict(zip(batch.schema.names, batch.take(pa.array(parents)).columns, strict=True))
    if several.column is not None:
        items, columns[several.column] = _with_number(items, several, where, rows[parents])
    columns[item] = items
    return pa.record_batch(columns), (rows[parents] << ITEM_BITS) + item_numbers


def _item_lists(texts: pa.Array, between: str) -> pa.Array:  # [N] -> lists [N]
    """Split texts into items without surrounding white space; " " splits at any white space."""
    texts = pc.utf8_trim_whitespace(texts)
    texts = pc.if_else(pc.equal(texts, ""), None, texts)
    if between == " ":
        return pc.utf8_split_whitespace(texts)
    lists = pc.split_pattern(texts, between)
    items = pc.utf8_trim_whitespace(lists.flatten())
    return pa.ListArray.from_arrays(lists.offsets, items, mask=lists.is_null())


def _with_number(
    items: pa.Array, several: Several, where: str, rows: np.ndarray
) -> tuple[pa.Array, pa.Array]:
    """Split items such as `N1-1`; return the items and the numbers after them."""
    pattern = pc.split_pattern(items, several.separator, max_splits=1, reverse=True)
    has_both = pc.equal(pc.list_value_length(pattern), 2)
    has_item = pc.invert(pc.starts_with(items, several.separator))
    index = first_row(pc.invert(pc.and_(has_both, has_item)))
    if index is not None:
        raise ValueError(
            f"{where}, row {rows[index]}: '{items[index]}' is no item with a number after "
            f"'{several.separator}'; write both, or leave `column` out"
        )
    try:
        return pc.list_element(pattern, 0), pc.list_element(pattern, 1).cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise ValueError(f"{where}: {error}; write a number after each item") from error
