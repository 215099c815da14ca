"""Find the files of a table, and read their columns in canonical types.

Ids are int64 or string, times microseconds, numbers float64. Shapes: N rows of a batch.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from recsys.data.events.settings import Source
from recsys.data.events.times import RowError, first_row, is_text, to_micros
from recsys.data.parquet.file import READ_ERRORS
from recsys.data.parquet.values import is_list
from recsys.storage.location import Location

Types = dict[str, pa.DataType]
Hive = dict[str, str | None]  # values of the `key=value/` folders in a file's path
ENDINGS = (".parquet", ".csv", ".csv.gz", ".tsv", ".dat")
# Names of files that look like data but are not read, which is an error.
ALIKE = r"\.(parquet|parq|pq|csv|tsv|dat|orc|avro|jsonl?|ndjson|feather|arrow)(\.\w+)?$"
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
INTEGER = "^(0|-?[1-9][0-9]*)$"
# Arrow's own list has NA and more, which may be ids, such as of a country or a user.
NULLS = ["", "NULL", "null", "NaN", "nan", "\\N"]
WILDCARDS = set("*?[")
BLOCK = 1 << 22  # bytes of a text file that are read at once


def data_files(name: str, root: Location, may_be_empty: bool = False) -> list[Location]:
    """Return the data files at and under a path, or those that a pattern such as *.csv matches.

    Raises a ValueError for a data file in another format, and without files unless `may_be_empty`.
    """
    if root.filesystem.isfile(root.path):
        if not root.path.endswith(ENDINGS):
            raise ValueError(f"{root}: none of {', '.join(ENDINGS)}; rename or convert it")
        return [root]
    folder, problem = fixed_folder(root), "no .parquet or .csv files in it"
    if folder != root:
        files, problem = _matching_files(root, folder), "matches no .parquet or .csv file"
    elif root.exists():
        files = _files_under(root, set())
    elif may_be_empty:  # an object store has no empty folders
        return []
    else:
        raise ValueError(f"{root}: no such file or folder; correct the path of '{name}'")
    if not files and not may_be_empty:
        raise ValueError(f"{root}: {problem}; correct the path of '{name}'")
    return sorted(files, key=lambda file: file.path)


def fixed_folder(root: Location) -> Location:
    """Return the folder in which a pattern is looked up; a path without wildcards as it is."""
    names = root.path.split("/")
    first = next((index for index, name in enumerate(names) if WILDCARDS & set(name)), len(names))
    if first == len(names) or root.exists():  # wildcards may occur in a file's name
        return root
    return Location(root.filesystem, "/".join(names[:first]))


def _matching_files(pattern: Location, folder: Location) -> list[Location]:
    entries = []
    for path, entry in pattern.filesystem.glob(pattern.path, detail=True).items():
        is_hidden = any(name.startswith((".", "_")) for name in path[len(folder.path) :].split("/"))
        # `**` matches a folder and the files in it, too.
        if not is_hidden and ("**" not in pattern.path or entry["type"] == "file"):
            entries.append(entry)
    return _data_files_among(entries, pattern, set())


def _files_under(folder: Location, visited: set[str]) -> list[Location]:
    real_path = os.path.realpath(folder.path) if folder.is_local else folder.path
    if real_path in visited:
        raise ValueError(f"{folder}: a link to a folder that is read already; remove it")
    visited.add(real_path)
    return _data_files_among(folder.filesystem.ls(folder.path, detail=True), folder, visited)


def _data_files_among(
    entries: Iterable[dict[str, Any]], folder: Location, visited: set[str]
) -> list[Location]:
    files = []
    for listed in entries:
        path, kind = listed["name"].rstrip("/"), listed["type"]
        entry, name = Location(folder.filesystem, path), path.rsplit("/", 1)[-1]
        if name.startswith((".", "_")) or path == folder.path:
            continue
        if kind != "file":  # a link, a pipe ...
            kind = "directory" if folder.filesystem.isdir(path) else kind
            kind = "file" if folder.filesystem.isfile(path) or not entry.exists() else kind
        if kind == "directory":
            files += _files_under(entry, visited)
        elif kind == "file" and name.endswith(ENDINGS):
            files.append(entry)
        elif re.search(ALIKE, name, re.IGNORECASE):
            endings = ", ".join(ENDINGS)
            raise ValueError(f"{entry}: would be left out; write {endings}, or remove it")
    return files


def partition_values(roots: list[str], url: str) -> Hive:
    """Return the values of Hive's `key=value/` folders between a root and a file."""
    root = max((root for root in roots if url.startswith(root)), key=len)
    folders = url[len(root) :].split("/")[:-1]
    texts = dict(folder.split("=", 1) for folder in folders if "=" in folder)
    return {
        unquote(name): None if text in ("", HIVE_NULL) else unquote(text)
        for name, text in texts.items()
    }


def csv_batches(
    file: Location, source: Source, columns: list[str], types: Types
) -> Iterator[pa.RecordBatch]:
    """Yield columns of a text file; a missing column, or another type, is a ValueError."""
    delimiter = source.delimiter or ("\t" if ".tsv" in file.path else ",")
    parse = pa_csv.ParseOptions(delimiter=delimiter, quote_char='"' if source.in_quotes else False)
    try:
        with file.arrow.open_input_stream(file.path) as stream:
            names = source.header or _csv_header(stream.read(1 << 16), parse)
        check_columns(file, names, columns)
        ids = [name for name, kind in types.items() if pa.types.is_integer(kind)]
        types, num_rows = types | dict.fromkeys(ids, pa.string()), 0
        while True:
            try:
                for batch in _csv_rows(file, source, parse, columns, types, num_rows):
                    num_rows += batch.num_rows
                    yield with_integers(batch, ids)
                return
            except pa.ArrowInvalid as error:
                types |= _later_type(error, names)
    except READ_ERRORS as error:
        match = re.match(r"In CSV column #(\d+): (.*)", str(error), re.DOTALL)
        where = f"column '{names[int(match[1])]}': {match[2]}" if match else str(error)
        raise ValueError(f"{file}: {where}; correct the file") from error


def _csv_rows(
    file: Location,
    source: Source,
    parse: pa_csv.ParseOptions,
    columns: list[str],
    types: Types,
    first_row: int,
) -> Iterator[pa.RecordBatch]:
    convert = pa_csv.ConvertOptions(
        include_columns=columns,
        column_types=types,
        strings_can_be_null=True,
        null_values=NULLS,
    )
    # With several threads, Arrow does not report the row of a bad value.
    read = pa_csv.ReadOptions(use_threads=False, block_size=BLOCK, column_names=source.header)
    with file.arrow.open_input_stream(file.path) as stream:
        for batch in pa_csv.open_csv(stream, read, parse, convert):
            yield batch.slice(first_row)
            first_row = max(first_row - batch.num_rows, 0)


def _later_type(error: pa.ArrowInvalid, names: list[str]) -> Types:
    """Return the type of a column that Arrow inferred wrongly from its first block, or raise."""
    match = re.match(
        r"In CSV column #(\d+): Row #\d+: CSV conversion error to (null|timestamp\[s\]): "
        "invalid value '(.*)'",
        str(error),
        re.DOTALL,
    )
    if match is None:
        raise error
    kind = pa.int64() if re.match(INTEGER, match[3]) else pa.string()
    return {names[int(match[1])]: kind if match[2] == "null" else pa.timestamp("ns")}


def _csv_header(start: bytes, parse: pa_csv.ParseOptions) -> list[str]:
    line = pa.py_buffer(start.splitlines()[0] + b"\n" if start else b"")
    if not len(line):
        raise pa.ArrowInvalid("the file is empty")
    return pa_csv.read_csv(pa.BufferReader(line), parse_options=parse).column_names


def id_type(texts: pa.Array) -> pa.DataType:
    """Return int64 for plain integers, float64 for other numbers, null for no value, or string."""
    if not len(texts.drop_null()):
        return pa.null()
    with suppress(pa.ArrowInvalid):
        if pc.all(pc.match_substring_regex(texts, INTEGER)).as_py():
            return texts.cast(pa.int64()).type
        if not pc.any(pc.match_substring_regex(texts, "^[+-]?0[0-9]")).as_py():
            return texts.cast(pa.float64()).type
    return pa.string()


def with_integers(batch: pa.RecordBatch, ids: list[str]) -> pa.RecordBatch:
    """Return a batch with text columns `ids` as integers; other texts are an ArrowInvalid."""
    for name in ids:
        texts = batch.column(name)
        row = first_row(pc.invert(pc.match_substring_regex(texts, INTEGER)))
        if row is not None:
            raise pa.ArrowInvalid(
                f"column '{name}': the id '{texts[row]}' is not written as an integer, but those "
                "before are; write Parquet with a column of strings, or ids of one form"
            )
        index = batch.schema.get_field_index(name)
        batch = batch.set_column(index, name, texts.cast(pa.int64()))
    return batch


def check_columns(file: Location, names: list[str], columns: list[str]) -> None:
    """Raise a ValueError for one of `columns` that a file lacks, or has twice."""
    for name in columns:
        if names.count(name) > 1:
            raise ValueError(f"{file}: column '{name}' occurs {names.count(name)} times; keep one")
        if name not in names:
            raise ValueError(
                f"{file}: column '{name}' is missing; the file has {names}. Write it or correct "
                "its name in the settings"
            )


LARGEST = float(np.finfo(np.float32).max)

# Arrow's view types are converted, as few functions support them.
PLAIN = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}


@dataclass(frozen=True)
class Field:
    """A column to read from the files of a table."""

    name: str
    column: str
    # id (integer or string), time, text, number, ids (list), any, words (any, but text in text
    # files, and a list of texts is one text), or missing (null).
    kind: str
    constant: str | None = None  # value of all rows, instead of a column


def canonical_type(kind: pa.DataType, field: Field, file: Location) -> pa.DataType:
    """Return the canonical type of a field whose file has type `kind`."""
    where = f"{file}: column '{field.column}' has type {kind}"
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    kind = PLAIN.get(kind, kind)
    if field.kind in ("time", "text"):
        return pa.int64() if field.kind == "time" else pa.string()
    if field.kind == "words" and is_list(kind) and is_text(kind.value_type):
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
    """Return a batch with Arrow's view types converted to plain texts and bytes."""
    columns = [values.cast(PLAIN.get(values.type, values.type)) for values in batch.columns]
    return pa.record_batch(columns, names=batch.schema.names)


def column_values(batch: pa.RecordBatch, field: Field, hive: Hive, kind: pa.DataType) -> pa.Array:
    """Return a field's values in the file, or from its folders, then as type `kind` if possible."""
    if field.constant is None and field.column not in hive:
        return batch.column(field.column)
    value = pa.array([hive[field.column] if field.constant is None else field.constant])
    with suppress(pa.ArrowInvalid):  # folder names are texts; times in ISO form stay texts
        value = value.cast(kind)
    return value.take(pa.array(np.zeros(batch.num_rows, np.int8)))


def canonical(
    values: pa.Array,  # [N]
    field: Field,
    source: Source,
    kind: pa.DataType,
    file: Location,
    rows: np.ndarray,
) -> pa.Array:  # [N]
    """Convert values to the canonical type; `rows` [N] are their row numbers, for errors."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        if field.kind == "time":
            return to_micros(values, source.time_unit, source.time_zone, source.time_format)
        if field.kind == "number":
            canonical_type(values.type, field, file)
            values = values.cast(kind, safe=False) if values.type != kind else values
        if field.kind == "words" and is_list(values.type) and kind == pa.string():
            lists = values.to_pylist()
            texts = [None if words is None else ", ".join(filter(None, words)) for words in lists]
            return pa.array(texts, kind)
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
        if isinstance(error, RowError):
            error = RowError(rows[error.row], error.problem)
        raise ValueError(f"{file}: column '{field.column}': {error}") from error


def _number(values: pa.Array) -> pa.Array:
    """Return numbers with null for NaN; numbers that are infinite in float32 are a RowError."""
    values = pc.if_else(pc.is_nan(values), None, values)
    row = first_row(pc.greater(pc.abs(values), LARGEST))
    if row is not None:
        raise RowError(row, f"{values[row]} is no finite float32; correct it, or write null")
    return values


def _without_empty_ids(values: pa.Array) -> pa.Array:
    if pa.types.is_list(values.type):
        ids = _without_empty_ids(values.flatten())
        offsets = pc.cumulative_sum(pc.fill_null(pc.list_value_length(values), 0))
        offsets = pa.concat_arrays([pa.array([0], pa.int32()), offsets])
        return pa.ListArray.from_arrays(offsets, ids, mask=values.is_null())
    return pc.if_else(pc.equal(values, ""), None, values) if is_text(values.type) else values
