"""Reads CSV files batch by batch; an error names column and row."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.csv as pa_csv

from recsys.data.events.settings import Source
from recsys.data.filesystem import Location
from recsys.data.parquet.file import READ_ERRORS


def csv_batches(
    file: Location, source: Source, columns: list[str], types: dict[str, pa.DataType]
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a text file; an error names column and row."""
    delimiter = source.delimiter or ("\t" if ".tsv" in file.path else ",")
    parse = pa_csv.ParseOptions(delimiter=delimiter, quote_char='"' if source.in_quotes else False)
    try:
        with file.arrow.open_input_stream(file.path) as stream:
            names = source.header or _csv_header(stream.read(1 << 16), delimiter)
        check_columns(file, names, columns)
        convert = pa_csv.ConvertOptions(
            include_columns=columns, column_types=types, strings_can_be_null=True
        )
        # One thread: with several, Arrow does not report the row of a bad value.
        read = pa_csv.ReadOptions(use_threads=False, block_size=1 << 22, column_names=source.header)
        with file.arrow.open_input_stream(file.path) as stream:
            yield from pa_csv.open_csv(
                stream, read_options=read, parse_options=parse, convert_options=convert
            )
    except READ_ERRORS as error:
        place = re.match(r"In CSV column #(\d+): (.*)", str(error), re.DOTALL)
        where = f"column '{names[int(place[1])]}': {place[2]}" if place else str(error)
        raise ValueError(f"{file}: {where}; correct the file") from error


def _csv_header(start: bytes, delimiter: str) -> list[str]:
    """Return the names in the first line."""
    line = pa.py_buffer(start.splitlines()[0] + b"\n" if start else b"")
    if not len(line):
        raise pa.ArrowInvalid("the file is empty")
    parse = pa_csv.ParseOptions(delimiter=delimiter)
    return pa_csv.read_csv(pa.BufferReader(line), parse_options=parse).column_names


def check_columns(file: Location, names: list[str], wanted: list[str]) -> None:
    """Raise a ValueError for a column that a file lacks, or has twice."""
    for name in wanted:
        if names.count(name) > 1:
            raise ValueError(f"{file}: column '{name}' occurs {names.count(name)} times; keep one")
        if name not in names:
            raise ValueError(
                f"{file}: column '{name}' is missing; the file has {names}. Write it or correct "
                "its name in the settings"
            )
