"""Columns of logs in canonical types: ids are int64 or string, times microseconds, numbers float64.

Shapes: N rows of a batch.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.data.events.log_files import Parts
from recsys.data.events.settings import Source
from recsys.data.events.times import to_micros
from recsys.data.parquet.values import is_list
from recsys.storage.location import Location

LARGEST = float(np.finfo(np.float32).max)

# Arrow has views, but functions for few of them.
PLAIN = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}


@dataclass(frozen=True)
class Field:
    """A column to read.

    kind: id (integer or string), time, text, number, ids (list), any, words (any, but text in text
        files), or missing (null).
    constant: value of all rows, instead of a column.
    """

    name: str
    column: str
    kind: str
    constant: str | None = None


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds texts."""
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def canonical_type(kind: pa.DataType, field: Field, file: Location) -> pa.DataType:
    """Return the type in which a column is kept."""
    where = f"{file}: column '{field.column}' has type {kind}"
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    kind = PLAIN.get(kind, kind)
    if field.kind == "time":
        return pa.int64()
    if field.kind == "text":
        return pa.string()
    if field.kind == "ids":
        if not (is_list(kind) or pa.types.is_null(kind)):
            raise ValueError(f"{where}, expected a list of ids; write lists, or set kind id")
        return pa.list_(_id_type(kind.value_type if is_list(kind) else kind, where))
    if field.kind == "id":
        return _id_type(kind, where)
    if field.kind == "number":
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)
        if not (number or pa.types.is_boolean(kind) or pa.types.is_decimal(kind)):
            raise ValueError(f"{where}, expected a number; write numbers, or set kind id")
        return pa.float64()
    return kind


def _id_type(kind: pa.DataType, where: str) -> pa.DataType:
    if pa.types.is_integer(kind):
        return pa.int64()
    if is_text(kind) or pa.types.is_null(kind):
        return pa.string()
    raise ValueError(f"{where}, expected integer or string; write ids of these types")


def without_views(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a batch whose texts and bytes are no views of others."""
    return pa.record_batch(
        [values.cast(PLAIN.get(values.type, values.type)) for values in batch.columns],
        names=batch.schema.names,
    )


def column_values(batch: pa.RecordBatch, field: Field, parts: Parts, kind: pa.DataType) -> pa.Array:
    """Return a field's values as they are in the file or its folders; `kind` is its own type."""
    if field.constant is None and field.column not in parts:
        return batch.column(field.column)
    value = pa.array([parts[field.column] if field.constant is None else field.constant])
    with suppress(pa.ArrowInvalid):  # the names of folders are texts; times in ISO form stay so
        value = value.cast(kind)
    return value.take(pa.array(np.zeros(batch.num_rows, np.int8)))


def canonical(
    values: pa.Array, field: Field, source: Source, kind: pa.DataType, file: Location
) -> pa.Array:  # values [N] -> [N]
    """Convert values to the canonical type."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        if field.kind == "time":
            return to_micros(values, source.time_unit, source.time_zone, source.time_format)
        if field.kind == "number":
            canonical_type(values.type, field, file)
            values = values.cast(kind, safe=False) if values.type != kind else values
        value_type = values.type.value_type if is_list(values.type) else values.type
        is_id = field.kind in ("id", "ids") and not pa.types.is_null(value_type)
        if is_id and canonical_type(values.type, field, file) != kind:
            raise ValueError(f"type {values.type}, but {kind} in the first file; write one type")
        values = values if values.type == kind else values.cast(kind)
        values.validate(full=True)  # texts are UTF-8
        if field.kind == "number":
            return _number(values)
        return _without_empty_ids(values) if field.kind in ("id", "ids") else values
    except (ValueError, pa.ArrowException) as error:
        if str(error).startswith(str(file)):
            raise
        raise ValueError(f"{file}: column '{field.column}': {error}") from error


def _number(values: pa.Array) -> pa.Array:
    """Return numbers with null for NaN; refuse those that are infinite in float32."""
    values = pc.if_else(pc.is_nan(values), None, values)
    large = pc.greater(pc.abs(values), LARGEST)
    if pc.any(large).as_py():
        value = values[pc.index(large, True).as_py()].as_py()
        raise ValueError(f"the value {value} is no finite float32; correct it, or write null")
    return values


def _without_empty_ids(values: pa.Array) -> pa.Array:
    if pa.types.is_list(values.type):
        ids = _without_empty_ids(values.flatten())
        offsets = pc.cumulative_sum(pc.fill_null(pc.list_value_length(values), 0))
        offsets = pa.concat_arrays([pa.array([0], pa.int32()), offsets])
        return pa.ListArray.from_arrays(offsets, ids, mask=values.is_null())
    return pc.if_else(pc.equal(values, ""), None, values) if is_text(values.type) else values
