"""Open Parquet files and read their columns; every error names the file.

Pages are checked if the writer stored checksums (pyarrow: `write_page_checksum=True`).
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.schema import Schema
from recsys.storage.location import Location
from recsys.storage.manifest import digest_of

# A damaged footer may hold names that are not UTF-8.
READ_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)
STREAM_BYTES = 1 << 20


@contextmanager
def open_parquet(file: Location, streaming: bool = False) -> Iterator[pq.ParquetFile]:
    """Open a file; `streaming` reads pages on demand. A ValueError names a damaged file."""
    try:
        if not file.exists():
            raise ValueError(f"{file}: no such file; correct the path")
        parquet = pq.ParquetFile(
            file.path,
            filesystem=file.arrow,
            page_checksum_verification=True,
            pre_buffer=not streaming,
            buffer_size=STREAM_BYTES if streaming else 0,
        )
    except READ_ERRORS as error:
        raise ValueError(f"{file}: not a readable Parquet file ({error})") from error
    with parquet:
        yield parquet


def read_row_group(
    parquet: pq.ParquetFile, file: Location, index: int, columns: list[str]
) -> pa.Table:
    """Read columns of a row group; a ValueError names the file if it is damaged."""
    try:
        return parquet.read_row_group(index, columns=columns)
    except READ_ERRORS as error:
        raise ValueError(
            f"{file}: row group {index} cannot be read ({error}); write the file again"
        ) from error


def rows_digest(file: Location, parquet: pq.ParquetFile, names: Collection[str] = ()) -> str:
    """Return a hash of a file's footer and of the stored values of these columns.

    The footer changes with nearly any change of content, but may not for a column of few distinct
    values, such as a label.
    """
    metadata, system = parquet.metadata, file.filesystem
    end_of_file = 8  # length of the footer and the magic number
    footer = system.cat_file(file.path, start=-(metadata.serialized_size + end_of_file))
    paths = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
    leaves = [leaf for leaf, path in enumerate(paths) if path.split(".")[0] in names]
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    columns = [group.column(leaf) for group in groups for leaf in leaves]
    starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
    ends = [start + column.total_compressed_size for start, column in zip(starts, columns)]
    files = [file.path] * len(columns)
    pages = system.cat_ranges(files, starts, ends, on_error="raise") if columns else []
    return digest_of(*map(bytes, (footer, *pages)))


def column_type(parquet: pq.ParquetFile, file: Location, name: str) -> pa.DataType:
    """Return the Arrow type of a column; a ValueError if it is missing or occurs twice."""
    names = parquet.schema_arrow.names
    if name not in names:
        raise ValueError(
            f"{file}: column '{name}' is missing; the file has {names}. Write it or take it out "
            "of schema.yaml"
        )
    if names.count(name) > 1:
        raise ValueError(f"{file}: column '{name}' occurs {names.count(name)} times; keep one")
    return parquet.schema_arrow.field(name).type


def mean_list_lengths(root: Location, schema: Schema, folder: str = "train") -> dict[str, float]:
    """Return the mean ids per row by list column, from the first file; {} if it is unreadable."""
    try:
        file = (root / folder).files(".parquet")[0]
        with open_parquet(file) as parquet:
            metadata = parquet.metadata
    except (IndexError, ValueError):
        return {}
    paths = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
    leaves = {path.split(".")[0]: leaf for leaf, path in enumerate(paths)}
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    means = {}
    for name in (*schema.of_kind("ids"), *schema.of_kind("sequence")):
        leaf = leaves.get(schema.file_columns([name])[0])
        if leaf is not None and metadata.num_rows:
            num_values = sum(group.column(leaf).num_values for group in groups)
            means[name] = num_values / metadata.num_rows
    return means
