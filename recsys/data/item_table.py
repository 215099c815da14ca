"""The items' Parquet files: one row per item, its id checked, its columns read chunk by chunk.

They are read when content is tokenised or decoded, once per machine, never in a training step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.filesystem import Location
from recsys.data.schema import Schema


def digest_of(*parts: Any) -> str:
    """A hash of bytes-like and printable parts."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part if isinstance(part, bytes | memoryview) else repr(part).encode())
    return digest.hexdigest()


class ItemTable:
    """The items' Parquet files: one row per item, ids checked.

    Raises:
        ValueError: no file, a missing column, a wrong type, an id that occurs twice or lies
            outside the target item's table.
    """

    def __init__(self, root: Location, schema: Schema) -> None:
        if schema.items is None:
            raise ValueError(
                f"{root}/schema.yaml: a model with content needs `items` with their columns; add "
                "them or set `content: none`"
            )
        self.schema, self.items = schema, schema.items
        self.folder = root / "items"
        files = self.folder.files(".parquet")
        if not files:
            raise ValueError(f"{self.folder}: no *.parquet files; write one row per item there")
        self.files = files
        self.ids = self._read_ids()

    def _read_ids(self) -> np.ndarray:
        parts = []
        for file, first_row, chunk in self.chunks(self.items.id):
            parts.append(self._checked_ids(chunk, f"{file}: column '{self.items.id}'", first_row))
        ids = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        if not len(ids):
            raise ValueError(f"{self.folder}: its files have no rows; write one row per item")
        order = np.argsort(ids, kind="stable")
        repeated = order[1:][np.diff(ids[order]) == 0]
        if len(repeated):
            file, row = self._place(int(repeated.min()))
            raise ValueError(
                f"{file}: column '{self.items.id}', row {row}: item {ids[repeated.min()]} has "
                "a row already; keep one row per item"
            )
        return ids

    def _checked_ids(self, chunk: pa.Array, where: str, first_row: int) -> np.ndarray:
        if not pa.types.is_integer(chunk.type):
            raise ValueError(f"{where} has type {chunk.type}, expected integer; write it so")
        if chunk.null_count:
            row = first_row + int(np.flatnonzero(chunk.is_null().to_numpy(False))[0])
            raise ValueError(f"{where}, row {row}: null; every item needs an id")
        ids = chunk.to_numpy()
        wrong = (ids < 0) | (ids >= self.schema.num_items)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"{where}, row {first_row + row}: id {ids[row]} is outside "
                f"[0, {self.schema.num_items}); raise num_embeddings of "
                f"'{self.schema.target_item}' in schema.yaml or remove the item"
            )
        return ids.astype(np.int64)

    def _place(self, row: int) -> tuple[Location, int]:
        """The file that holds a row of all files, and its row there."""
        for file, column in self._columns(self.items.id):
            if row < len(column):
                return file, row
            row -= len(column)
        raise AssertionError("row beyond the files")

    def _columns(self, name: str) -> Iterable[tuple[Location, pa.ChunkedArray]]:
        for file in self.files:
            if not file.exists():
                raise ValueError(f"{file}: no such file")
            try:
                with pq.ParquetFile(file.path, filesystem=file.arrow) as parquet:
                    if name not in parquet.schema_arrow.names:
                        raise ValueError(
                            f"{file}: column '{name}' is missing; the file has "
                            f"{parquet.schema_arrow.names}"
                        )
                    column = parquet.read([name])[name]
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{file}: not a readable Parquet file ({error})") from error
            yield file, column

    def chunks(self, name: str) -> Iterable[tuple[Location, int, pa.Array]]:
        """(file, first row in that file, values) of a column, in order."""
        for file, column in self._columns(name):
            row = 0
            for chunk in column.chunks:
                yield file, row, chunk
                row += len(chunk)

    def fingerprint(self, name: str) -> str:
        """A hash of a column's content and of the ids it belongs to."""
        buffers: list[Any] = [self.ids.tobytes()]
        for _, _, chunk in self.chunks(name):
            # A slice would share the buffers of its parent, so hash what it holds itself.
            compact = pa.concat_arrays([chunk])
            buffers += [len(compact), *(memoryview(part) for part in compact.buffers() if part)]
        return digest_of(*buffers)
