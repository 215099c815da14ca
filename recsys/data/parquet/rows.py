"""Rows of Parquet files, whose chunks are row groups."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.parquet.bad_rows import OnBadRow
from recsys.data.parquet.file import READ_ERRORS, column_type, open_parquet, rows_digest
from recsys.data.row_source import Chunk, RowSource, columns_to_read
from recsys.data.schema import Schema
from recsys.data.transforms.columns import check_types
from recsys.storage.location import Location


@dataclass(frozen=True, kw_only=True)
class RowGroup(Chunk):
    """A row group: `num_bytes` of uncompressed pages, `digest` of the file's footer and labels."""

    file: Location
    index: int
    footer: str  # digest of only the footer, compared whenever the file is opened


class ParquetRows(RowSource):
    """Rows of Parquet files in order; `on_bad_row` also applies to unreadable row groups."""

    def __init__(
        self,
        files: list[Location],
        schema: Schema,
        with_labels: bool = True,
        on_bad_row: OnBadRow = "error",
    ) -> None:
        names = columns_to_read(schema, with_labels)
        labels = [*schema.of_kind("label"), *schema.of_kind("weight")] if with_labels else []
        labels = schema.file_columns(labels)
        self.row_groups = [
            group for file in files for group in _row_groups(file, schema, names, labels)
        ]
        super().__init__(schema, self.row_groups, with_labels, on_bad_row)

    @staticmethod
    def of_split(
        root: Location, split: str, schema: Schema, on_bad_row: OnBadRow = "error"
    ) -> ParquetRows:
        """Return the rows of all `*.parquet` files in the folder `split` of a dataset."""
        folder = root / split
        files = folder.files(".parquet")
        if not files:
            raise ValueError(f"{folder}: no *.parquet files; write the rows of this split there")
        rows = ParquetRows(files, schema, on_bad_row=on_bad_row)
        if split not in ("valid", "test"):  # in these, stored scores rely on the group numbers
            rows.null_groups = zlib.crc32(split.encode()) << 31
        return rows

    def read_chunk(self, number: int) -> pa.Table:
        return next(iter(self.read_chunks([number])))

    def read_chunks(self, numbers: Sequence[int]) -> Iterator[pa.Table]:
        for file, groups in groupby(numbers, lambda number: self.row_groups[number].file):
            with open_parquet(file) as parquet:
                footer = rows_digest(file, parquet)
                for number in groups:
                    if self.row_groups[number].footer != footer:
                        raise ValueError(
                            f"{file}: was replaced after the job had opened it; bring it back and "
                            "start again"
                        )
                    yield self._read_group(parquet, number)

    def _read_group(self, parquet: pq.ParquetFile, number: int) -> pa.Table:
        group = self.row_groups[number]
        try:
            table = parquet.read_row_group(group.index, columns=self.columns)
            if table.num_rows != group.num_rows:
                raise OSError(f"{table.num_rows} rows instead of {group.num_rows}")
        except READ_ERRORS as error:
            bad, reason = np.ones(group.num_rows, bool), "row group that cannot be read"
            location = f"row group {group.index} (rows from {group.first_row})"
            message = f"{location} cannot be read ({error}); write the file again"
            self.bad_rows.add(group.place, "", group.first_row, bad, reason, lambda row: message)
            return self.padding(group.num_rows)
        return self.usable(number, table)


split_rows = ParquetRows.of_split  # the source `parquet`


def _row_groups(
    file: Location, schema: Schema, names: list[str], labels: list[str]
) -> Iterator[RowGroup]:
    with open_parquet(file) as parquet:
        metadata, footer = parquet.metadata, rows_digest(file, parquet)
        digest = rows_digest(file, parquet, labels)
        check_types(schema, names, lambda name: column_type(parquet, file, name), str(file))
    if metadata.num_rows == 0:
        raise ValueError(f"{file}: the file has no rows; remove it or write it again")
    first_row = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        size = group.total_byte_size
        chunk = str(file), group.num_rows, first_row, size, digest
        yield RowGroup(*chunk, file=file, index=index, footer=footer)
        first_row += group.num_rows
