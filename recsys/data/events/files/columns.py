"""Columns of logs in canonical types: ids are int64 or string, times microseconds, numbers float64.

Shapes: N rows of a batch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.data.events.settings import Source
from recsys.data.events.times import to_micros
from recsys.data.filesystem import Location

LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Field:
    """A column to read.

    kind: id (integer or string), time, text, number, ids (list of ids), any, or missing (null).
    constant: value of all rows, instead of a column.
    """

    name: str
    column: str
    kind: str
    constant: str | None = None


def columns_in_files(fields: list[Field], parts: dict[str, str]) -> list[str]:
    """Return the columns that files hold, each once."""
    names = {of.column: None for of in fields if of.constant is None and of.kind != "missing"}
    return [name for name in names if name not in parts]


def canonical_type(kind: pa.DataType, field: Field, file: Location) -> pa.DataType:
    """Return the type in which a column is kept."""
    where = f"{file}: column '{field.column}' has type {kind}"
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if field.kind == "time":
        return pa.int64()
    if field.kind == "text":
        return pa.string()
    if field.kind == "ids":
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise ValueError(f"{where}, expected a list of ids; write lists, or set kind id")
        return pa.list_(_id_type(kind.value_type, where))
    if field.kind == "id":
        return _id_type(kind, where)
    if field.kind == "number":
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not (number or pa.types.is_boolean(kind) or pa.types.is_decimal(kind)):
            raise ValueError(f"{where}, expected a number; write numbers, or set kind id")
        return pa.float64()
    return kind


def _id_type(kind: pa.DataType, where: str) -> pa.DataType:
    """Return int64 or string."""
    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        return pa.string()
    raise ValueError(f"{where}, expected integer or string; write ids of these types")


def column_values(batch: pa.RecordBatch, field: Field, parts: dict[str, str]) -> pa.Array:
    """Return a field's values as they are in the file."""
    if field.constant is not None:
        return pa.array([field.constant]).take(pa.array(np.zeros(batch.num_rows, np.int8)))
    if field.column in parts:
        return partition_array(parts[field.column], batch.num_rows)
    return batch.column(field.column)


def partition_array(text: str, length: int) -> pa.Array:
    """Return the value of a `key=value/` folder for each row; digits are integers."""
    value: str | int = int(text) if re.fullmatch(r"-?\d{1,18}", text) else text
    return pa.array([value]).take(pa.array(np.zeros(length, np.int8)))


def canonical(
    values: pa.Array,  # [N]
    field: Field,
    source: Source,
    kind: pa.DataType,
    file: Location,
) -> pa.Array:  # [N]
    """Convert values to the canonical type."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        if field.kind == "time":
            return to_micros(values, source.time_unit, source.time_zone, source.time_format)
        if field.kind == "number":
            canonical_type(values.type, field, file)
            values = values.cast(kind, safe=False) if values.type != kind else values
        is_null = pa.types.is_null(values.type)
        if field.kind == "id" and not is_null and _id_type(values.type, "") != kind:
            raise ValueError(f"type {values.type}, but {kind} in the first file; write one type")
        values = values if values.type == kind else values.cast(kind)
        values.validate(full=True)  # texts are UTF-8
        return _number(values) if field.kind == "number" else _without_null_ids(values, field)
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


def _without_null_ids(values: pa.Array, field: Field) -> pa.Array:
    """Return the values; refuse a null inside a list of ids."""
    if field.kind == "ids" and values.flatten().null_count:
        raise ValueError("null inside a list of ids; fill it or leave it out")
    return values
