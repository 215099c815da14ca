"""Convert columns of a row group to the types of a batch, and check their values.

A null raw id is unknown: the last row of an exact or bounded vocabulary, a reserved id in a hash.
Shapes: R rows, N values of a column, H rows per id.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embeddings.vocabulary.fixed import (
    NULL_ID,
    ExactVocabulary,
    HashVocabulary,
    integer_ids,
    is_id_type,
    mix64,
)
from recsys.data.schema import Schema
from recsys.data.schema_columns import RAW_GROUP as RAW_GROUP
from recsys.data.schema_columns import ROW_POSITION as ROW_POSITION
from recsys.data.schema_columns import TARGETS_BEFORE as TARGETS_BEFORE
from recsys.data.schema_columns import Column, HistoryColumns
from recsys.data.transforms.steps import is_number
from recsys.storage.location import errors_at

VIEWS = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
MAX_LIST_VALUES = np.iinfo(np.int32).max  # values of a list column, whose offsets are int32

# Takes a column, the mask of its bad rows [R], their reason, and a function from row to message.
ReportColumn = Callable[[str, np.ndarray, str, Callable[[int], str]], None]


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds lists of any kind."""
    return isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType)


def list_lengths(column: pa.ChunkedArray | pa.Array) -> np.ndarray:  # [R] -> [R]
    """Return the lengths of the lists; 0 for a null list."""
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    return lengths.to_numpy() if isinstance(lengths, pa.ChunkedArray) else lengths.to_numpy(False)


def _expected(schema: Schema, name: str) -> tuple[bool, bool]:
    """Return whether a column has lists, and whether its values are ids."""
    column = schema.columns.get(name)
    if column is None:  # a parallel list
        return True, False
    return column.kind in ("ids", "sequence"), column.kind in ("id", "ids", "sequence")


def check_type(schema: Schema, name: str, kind: pa.DataType, file: str) -> None:
    """Raise a ValueError if a column's type differs from the schema's."""
    has_lists, has_integers = _expected(schema, name)
    is_raw = schema.vocabulary_of(name) is not None
    value = kind.value_type if is_list(kind) else kind
    may_be_null = has_lists or is_raw or schema.columns[name].kind == "extra"
    may_be_null = may_be_null or schema.columns[name].nullable
    if pa.types.is_null(value) and may_be_null and (has_lists or not is_list(kind)):
        return  # a column of only nulls or empty lists
    is_fitting = is_id_type if is_raw else pa.types.is_integer if has_integers else is_number
    if is_list(kind) != has_lists or not is_fitting(value):
        expected = "integer or string" if is_raw else "integer" if has_integers else "float"
        expected = f"list<{expected}>" if has_lists else expected
        raise ValueError(
            f"{file}: column '{name}' has type {kind}, expected {expected}; write it with that "
            "type or correct its kind in schema.yaml"
        )
    if not is_raw:
        return
    vocabulary = schema.vocabularies.get(schema.table_of(name))
    if isinstance(vocabulary, ExactVocabulary):
        with errors_at(f"{file}: column '{name}'"):
            vocabulary.check_type(value)
    schema.require_id_type(name, value, file, schema.table_of(name))


def empty_table(schema: Schema, names: list[str]) -> pa.Table:
    """Return an empty table with columns `names`, the raw group if there is one, and positions."""
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
    """Return rows that losses and metrics ignore: zeros, empty lists, position -1."""
    columns = {}
    for field in like.schema:
        value: Any = [] if is_list(field.type) else -1 if field.name == ROW_POSITION else 0
        columns[field.name] = pa.array([value] * num_rows, field.type)
    return pa.table(columns, schema=like.schema)


def usable_table(
    table: pa.Table,
    schema: Schema,
    positions: np.ndarray,  # int64 [R], in the split
    report: ReportColumn,
    null_groups: int = 0,
) -> pa.Table:
    """Return the rows at these positions in canonical types; padding rows replace bad rows.

    A row is reported for its first bad column. Each row with a null group gets a group of its own;
    these groups differ between values of `null_groups`.
    """
    bad = np.zeros(table.num_rows, bool)

    def note(column: str, rows: np.ndarray, reason: str, message: Callable[[int], str]) -> None:
        report(column, rows & ~bad, reason, message)
        bad[rows] = True

    arrays = [usable_column(table, name, schema, note) for name in table.column_names]
    if schema.vocabulary_of(schema.group) is not None:
        # Raw ids of the group as integers; each row without an id is a group of its own.
        ids = _with_values(one_chunk(table[schema.group]), False, True)
        groups, null, _ = _rows_of_ids(ids, None)
        arrays.append(
            pa.array(np.where(null, mix64(positions + null_groups).view(np.int64), groups))
        )
    usable = pa.table([*arrays, positions], schema=empty_table(schema, table.column_names).schema)
    for history in schema.histories:
        _check_parallel(usable, schema, history, note)
    _note_rows_without_label(usable, schema, note)
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
    # Ids are checked in the file's type, since a cast makes large unsigned ids negative.
    file_type = array.type.value_type if is_list_column else array.type
    array = _cast(array, file_type if is_integer else pa.float32(), is_list_column)
    column = schema.columns.get(name)
    if column is not None and column.kind == "extra":
        array = pc.fill_null(array, float("nan"))
    values = array.flatten() if is_list_column else array
    filled = values.fill_null(0) if values.null_count else values
    numbers = filled.to_numpy(zero_copy_only=False)

    note_values = partial(_note_values, note, name, array)
    if values.null_count and not (column and column.nullable):
        fix = "null; fill it or drop the row"
        if is_list_column:
            fix = "null inside the list; fill it or leave it out"
        if is_integer:
            fix += ", or give the column a vocabulary, in which null is the unknown id"
        note_values(values.is_null().to_numpy(False), "null", fix)
    if is_integer:
        limit, owner = schema.limit(name), schema.table_of(name)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= limit):
            outside, problem = (numbers < 0) | (numbers >= limit), f"outside [0, {limit})"
            fix = f"raise num_embeddings of '{owner}' in schema.yaml or map the ids to rows"
            first = numbers[outside.argmax()]
            note_values(outside, f"id {problem}", f"id {first} is {problem}; {fix}")
        return _cast(array, pa.int64(), is_list_column)
    for bad, reason, fix in _bad_numbers(numbers, column):
        if bad.any():
            note_values(bad, reason, f"value {numbers[bad.argmax()]}; {fix}")
    return array


def _with_values(array: pa.Array, is_list_column: bool, is_integer: bool) -> pa.Array:
    """Return the array; if its values have type null, cast them to the expected type."""
    value = array.type.value_type if is_list(array.type) else array.type
    if not pa.types.is_null(value):
        return array
    return _cast(array, pa.int64() if is_integer else pa.float32(), is_list_column)


def _note_values(
    note: ReportColumn, name: str, array: pa.Array, bad: np.ndarray, reason: str, message: str
) -> None:  # array [R], of values or lists; bad bool [N]
    """Report the rows of the bad values of a column, which may have lists."""
    if not bad.any():
        return
    if is_list(array.type):
        rows = np.repeat(np.arange(len(array)), list_lengths(array))
        bad = np.bincount(rows[bad], minlength=len(array)) > 0
    note(name, bad, reason, lambda row: message)


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array, without a copy if it has one chunk and no views."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return without_views(array)


def without_views(values: pa.Array) -> pa.Array:
    """Return values, or lists of them, in a type without views, which Arrow cannot filter."""
    value = values.type.value_type if is_list(values.type) else values.type
    if (plain := VIEWS.get(value)) is None:
        return values
    return values.cast(pa.large_list(plain) if is_list(values.type) else plain)


def _rows_of_raw_ids(array: pa.Array, name: str, schema: Schema, note: ReportColumn) -> pa.Array:
    """Return the rows of raw ids, or the ids as integers if the vocabulary is bounded."""
    as_list = is_list(array.type)
    values = array.flatten() if as_list else array
    vocabulary = schema.vocabularies.get(schema.table_of(name))
    num_rows = schema.rows_per_id(name)
    if len(values) * num_rows > MAX_LIST_VALUES:
        reason = f"more than {MAX_LIST_VALUES:,} rows of ids in a row group"
        note(name, np.ones(len(array), bool), reason, lambda row: f"{reason}; write smaller ones")
        return pa.array([[]] * len(array), pa.list_(pa.int64()))
    rows, null, too_large = _rows_of_ids(values, vocabulary)
    note_values = partial(_note_values, note, name, array)
    if name == schema.target_item:
        note_values(null, "null", "null; every row ranks an item: give its id, or leave it out")
    note_values(too_large, "id beyond int64", "an id that does not fit int64; renumber it")
    if not as_list and num_rows == 1:
        return pa.array(rows.reshape(-1))
    lengths = list_lengths(array).astype(np.int64) if as_list else np.ones(len(array), np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths * num_rows)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.reshape(-1)))


def _rows_of_ids(
    ids: pa.Array, vocabulary: ExactVocabulary | HashVocabulary | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # [N] -> int64 [N] or [N, H], bool [N], bool [N]
    """Return rows of raw ids, which ids are null, and which are too large for int64.

    Without `vocabulary`, ids become integers instead. Null is the unknown id. Too large ids get 0.
    """
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    null, too_large = ids.is_null().to_numpy(False), np.zeros(len(ids), bool)
    if pa.types.is_uint64(ids.type):
        too_large = ids.fill_null(0).to_numpy(zero_copy_only=False) > np.iinfo(np.int64).max
    find_rows = integer_ids if vocabulary is None else vocabulary.rows_of
    usable = ~(null | too_large)
    if usable.all():
        return find_rows(ids), null, too_large
    usable_rows = find_rows(ids.filter(pa.array(usable)))
    rows = np.zeros((len(ids), *usable_rows.shape[1:]), np.int64)
    rows[usable] = usable_rows
    if isinstance(vocabulary, ExactVocabulary):
        rows[null] = vocabulary.unknown_row
    else:
        rows[null] = find_rows(pa.array([NULL_ID]))[0]
    return rows, null, too_large


def _bad_numbers(
    numbers: np.ndarray, column: Column | None
) -> Iterator[tuple[np.ndarray, str, str]]:  # numbers float32 [N]
    """Yield masks of unusable values [N] with reason and fix; `column` is None for a list."""
    fix = "write a finite number that fits float32"
    if column is not None and column.kind == "extra":  # NaN: the row has no value
        yield np.isinf(numbers), "not finite", f"{fix}, or null"
        return
    finite = np.isfinite(numbers)
    yield ~finite, "not finite", fix
    if column is None:
        return
    negative, not_binary = finite & (numbers < 0), finite & (numbers != 0) & (numbers != 1)
    if column.kind == "weight":
        yield negative, "weight below 0", "a weight is 0 or more"
    if column.kind == "sampled":
        fix = "write 1 in rows whose item was drawn, else 0"
        yield not_binary, "sampled other than 0 and 1", fix
    if column.kind == "label" and column.loss == "poisson":
        yield negative, "label below 0", "a count is 0 or more"
    if column.kind == "label" and column.loss in (None, "bce"):
        fix = "a label is 0 or 1, or give it a loss (mse, huber, poisson)"
        yield not_binary, "label other than 0 and 1", fix


def _note_rows_without_label(table: pa.Table, schema: Schema, note: ReportColumn) -> None:
    labels = [name for name in schema.of_kind("label") if name in table.column_names]
    if labels and all(schema.columns[name].nullable for name in labels):
        unknown = np.logical_and.reduce([table[name].is_null().to_numpy() for name in labels])
        message = f"null, as all of {labels}; drop rows without any label"
        note(labels[0], unknown, "no label", lambda row: message)


def _check_parallel(
    table: pa.Table, schema: Schema, history: HistoryColumns, note: ReportColumn
) -> None:
    def num_ids(name: str) -> np.ndarray:  # [R]
        return list_lengths(table[name]) // schema.rows_per_id(name)

    lengths, unlike = num_ids(history.name), f"another length than '{history.name}'"

    def message(row: int) -> str:
        return f"the list has {unlike} ({lengths[row]} items); write one value per item"

    for name in (*history.numbers, *history.ids):
        note(name, num_ids(name) != lengths, f"list of {unlike}", message)


def _cast(array: pa.Array, value_type: pa.DataType, as_list: bool) -> pa.Array:
    kind = pa.list_(value_type) if as_list else value_type
    return array if array.type == kind else array.cast(kind, safe=False)
