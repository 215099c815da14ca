"""Columns of a row group in the types of a batch, with their values checked.

Ids become int64 (raw ones become rows if their vocabulary is fixed), numbers float32, lists
`list<...>` of them. A row with an unusable value is reported (which may end the job) and becomes a
padding row: position -1, no weight, no metric.

Shapes: R rows, N values of a column, H rows per id.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embeddings.vocabulary.fixed import ExactVocabulary, is_id_type
from recsys.data.parquet.numbers import bad_numbers, note_rows_without_label
from recsys.data.parquet.raw_ids import plain_ids, raw_groups, rows_of_ids
from recsys.data.schema import Schema
from recsys.data.schema_columns import RAW_GROUP as RAW_GROUP
from recsys.data.schema_columns import ROW_POSITION as ROW_POSITION

MAX_LIST_VALUES = np.iinfo(np.int32).max  # of a column of lists, whose offsets are int32

# Column, mask of its bad rows [R], their common reason, and a function from a row to its message.
ReportColumn = Callable[[str, np.ndarray, str, Callable[[int], str]], None]


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds lists of any kind."""
    return isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType)


def list_lengths(column: pa.ChunkedArray | pa.Array) -> np.ndarray:  # [R] -> [R]
    """Return the lengths of the lists; 0 for a null list."""
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    return lengths.to_numpy() if isinstance(lengths, pa.ChunkedArray) else lengths.to_numpy(False)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _expected(schema: Schema, name: str) -> tuple[bool, bool]:
    """Return (is a list, is an integer) of the column according to the schema."""
    column = schema.columns.get(name)
    if column is None:  # a parallel list
        return True, False
    return column.kind in ("ids", "sequence"), column.kind in ("id", "ids", "sequence")


def check_type(schema: Schema, name: str, kind: pa.DataType, file: str) -> None:
    """Raise a ValueError if a column's type differs from the schema's."""
    wants_list, wants_integer = _expected(schema, name)
    is_raw = schema.vocabulary_of(name) is not None
    value = kind.value_type if is_list(kind) else kind
    if pa.types.is_null(value) and _takes_nulls(schema, name, kind):
        return
    is_fitting = is_id_type if is_raw else pa.types.is_integer if wants_integer else _is_number
    if is_list(kind) != wants_list or not is_fitting(value):
        wanted = "integer or string" if is_raw else "integer" if wants_integer else "float"
        wanted = f"list<{wanted}>" if wants_list else wanted
        raise ValueError(
            f"{file}: column '{name}' has type {kind}, expected {wanted}; write it with that type "
            "or correct its kind in schema.yaml"
        )
    if not is_raw:
        return
    vocabulary = schema.vocabularies.get(schema.table_of(name))
    if isinstance(vocabulary, ExactVocabulary):
        try:
            vocabulary.check_type(value)
        except ValueError as error:
            raise ValueError(f"{file}: column '{name}': {error}") from error
    schema.require_id_type(name, value, file, schema.table_of(name))


def _takes_nulls(schema: Schema, name: str, kind: pa.DataType) -> bool:
    """Return whether a column may have a type without values: of nulls or of empty lists."""
    if _expected(schema, name)[0]:
        return True
    column, is_raw = schema.columns[name], schema.vocabulary_of(name) is not None
    return not is_list(kind) and (is_raw or column.nullable or column.kind == "extra")


def empty_table(schema: Schema, names: list[str]) -> pa.Table:
    """Return an empty table with the columns of a batch: `names` and row positions.

    If the group has a vocabulary, its raw ids are a column of their own.
    """
    kinds = []
    for name in names:
        is_list_column, is_integer = _expected(schema, name)
        value = pa.int64() if is_integer else pa.float32()
        is_list_column |= schema.rows_per_id(name) > 1
        kinds.append((name, pa.list_(value) if is_list_column else value))
    if schema.vocabulary_of(schema.group) is not None:
        kinds.append((RAW_GROUP, pa.int64()))
    return pa.schema([*kinds, (ROW_POSITION, pa.int64())]).empty_table()


def padding_rows(like: pa.Table, num_rows: int) -> pa.Table:
    """Return rows without effect on losses and metrics: zeros, empty lists, position -1."""
    columns = {}
    for field in like.schema:
        value: Any = [] if is_list(field.type) else -1 if field.name == ROW_POSITION else 0
        columns[field.name] = pa.array([value] * num_rows, field.type)
    return pa.table(columns, schema=like.schema)


def usable_table(
    table: pa.Table, schema: Schema, positions: np.ndarray, report: ReportColumn
) -> pa.Table:
    """Return the columns of a chunk in canonical types, with padding rows in place of bad ones.

    `positions` int64 [R] are those of its rows in the split. `report` receives the bad rows of each
    column; a row counts for its first bad column.
    """
    bad = np.zeros(table.num_rows, bool)

    def note(column: str, rows: np.ndarray, reason: str, message: Callable[[int], str]) -> None:
        report(column, rows & ~bad, reason, message)
        bad[rows] = True

    arrays = [usable_column(table, name, schema, note) for name in table.column_names]
    if schema.vocabulary_of(schema.group) is not None:
        groups = _with_values(one_chunk(table[schema.group]), False, True)
        arrays.append(pa.array(raw_groups(groups, positions)))
    usable = pa.table([*arrays, positions], schema=empty_table(schema, table.column_names).schema)
    _check_parallel(usable, schema, note)
    note_rows_without_label(usable, schema, note)
    if not bad.any():
        return usable
    with_padding = pa.concat_tables([usable, padding_rows(usable, 1)])
    return with_padding.take(np.where(bad, table.num_rows, np.arange(table.num_rows)))


def usable_column(table: pa.Table, name: str, schema: Schema, note: ReportColumn) -> pa.Array:
    """Return a column in its canonical type; the values of bad rows are arbitrary."""
    is_list_column, is_integer = _expected(schema, name)
    array = _with_values(one_chunk(table[name]), is_list_column, is_integer)
    if schema.vocabulary_of(name) is not None:
        return _rows_of_raw_ids(array, name, schema, note)
    if name in schema.of_kind("extra"):
        return _extra_column(array, name, note)
    # Ids are checked in the file's type, since a cast makes large unsigned ids negative.
    own_type = array.type.value_type if is_list_column else array.type
    array = _cast(array, own_type if is_integer else pa.float32(), is_list_column)
    values = array.flatten() if is_list_column else array
    null = "null; fill it or drop the row"
    if is_list_column:
        null = "null inside the list; fill it or leave it out"
    if is_integer:
        null += ", or give the column a vocabulary, in which null is the unknown id"
    numbers = values.fill_null(0).to_numpy(zero_copy_only=False)

    def note_values(bad: np.ndarray, reason: str, message: Callable[[Any], str]) -> None:
        """Note the rows of bad values [N]; the message is about the first of them."""
        rows = _rows_of_values(array, bad)
        note(name, rows, reason, lambda row: message(numbers[bad.argmax()]))

    column = schema.columns.get(name)
    if values.null_count and not (column and column.nullable):
        note_values(values.is_null().to_numpy(False), "null", lambda value: null)
    if is_integer:
        limit, owner = schema.limit(name), schema.table_of(name)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= limit):
            note_values(
                (numbers < 0) | (numbers >= limit),
                f"id outside [0, {limit})",
                lambda value: (
                    f"id {value} is outside [0, {limit}); raise num_embeddings of '{owner}' "
                    "in schema.yaml or map the ids to rows"
                ),
            )
        return _cast(array, pa.int64(), is_list_column)
    for bad, reason, message in bad_numbers(numbers, column):
        if bad.any():
            note_values(bad, reason, message)
    return array


def _with_values(array: pa.Array, is_list_column: bool, is_integer: bool) -> pa.Array:
    """Return nulls or empty lists that have no type of values with one."""
    value = array.type.value_type if is_list(array.type) else array.type
    if not pa.types.is_null(value):
        return array
    return _cast(array, pa.int64() if is_integer else pa.float32(), is_list_column)


def _extra_column(array: pa.Array, name: str, note: ReportColumn) -> pa.Array:
    """Return a column of kind extra in float32, NaN where a row has no value."""
    array = pc.fill_null(_cast(array, pa.float32(), False), float("nan"))
    numbers = array.to_numpy()
    if np.isinf(numbers).any():
        message = "write a finite number that fits float32, or null"
        note(name, np.isinf(numbers), "not finite", lambda row: f"value {numbers[row]}; {message}")
    return array


def _rows_of_values(array: pa.Array, values: np.ndarray) -> np.ndarray:
    """Return a mask of the rows [R] that hold a marked value; a row is a value or a list."""
    if not is_list(array.type):
        return values
    rows = np.repeat(np.arange(len(array)), list_lengths(array))
    return np.bincount(rows[values], minlength=len(array)) > 0


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array, without a copy if it has one chunk."""
    if column.num_chunks == 1:
        return column.chunk(0)
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def _rows_of_raw_ids(array: pa.Array, name: str, schema: Schema, note: ReportColumn) -> pa.Array:
    """Return raw ids as rows, or as integers if their vocabulary is bounded; null is unknown."""
    as_list = is_list(array.type)
    values = array.flatten() if as_list else array
    lengths = list_lengths(array).astype(np.int64) if as_list else np.ones(len(array), np.int64)
    values, null, too_large = plain_ids(values)

    def note_values(bad: np.ndarray, reason: str, message: str) -> None:
        note(name, _rows_of_values(array, bad), reason, lambda row: message)

    if name == schema.target_item:
        note_values(null, "null", "null; every row ranks an item: fill it or drop the row")
    note_values(too_large, "id beyond int64", "an id that does not fit int64; renumber it")
    vocabulary = schema.vocabularies.get(schema.table_of(name))
    num_rows = schema.rows_per_id(name)
    if len(values) * num_rows > MAX_LIST_VALUES:
        reason = f"more than {MAX_LIST_VALUES:,} rows of ids in a row group"
        note(name, np.ones(len(array), bool), reason, lambda row: f"{reason}; write smaller ones")
        return pa.array([[]] * len(array), pa.list_(pa.int64()))
    found = rows_of_ids(values, null, too_large, vocabulary).reshape(-1, num_rows)
    if not as_list and num_rows == 1:
        return pa.array(found[:, 0])
    offsets = np.concatenate([[0], np.cumsum(lengths * num_rows)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(found.reshape(-1)))


def _check_parallel(table: pa.Table, schema: Schema, note: ReportColumn) -> None:
    """Note rows with a parallel list of another length than its history."""
    for history in schema.histories:
        lengths = _num_ids(table, history.name, schema)
        for name in (*history.numbers, *history.ids):
            note(
                name,
                _num_ids(table, name, schema) != lengths,
                f"list of another length than '{history.name}'",
                partial(_length_message, history.name, lengths),
            )


def _length_message(history: str, lengths: np.ndarray, row: int) -> str:
    return (
        f"the list has another length than '{history}' ({lengths[row]} items); "
        "write one value per item"
    )


def _num_ids(table: pa.Table, name: str, schema: Schema) -> np.ndarray:  # [R]
    """Return the lengths of the lists as they were written, before ids became rows."""
    return list_lengths(table[name]) // schema.rows_per_id(name)


def _cast(array: pa.Array, value_type: pa.DataType, as_list: bool) -> pa.Array:
    """Cast numbers, or the values of lists."""
    return array.cast(pa.list_(value_type) if as_list else value_type, safe=False)
