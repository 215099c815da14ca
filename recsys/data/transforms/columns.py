"""Compute the columns of a schema from those of a file or request; no other module does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pyarrow as pa

from embeddings.vocabulary.fixed import is_id_type
from recsys.data.parquet.values import check_type, is_list, list_lengths, one_chunk
from recsys.data.schema import Schema
from recsys.data.transforms.chain import Chain


def read_columns(table: pa.Table, schema: Schema, names: Sequence[str], place: str) -> pa.Table:
    """Return columns `names`, transformed, of a table with `schema.file_columns(names)`."""
    if not any(name in schema.transforms for name in names):
        return table.select(names)
    rows = TransformedRows(table, schema, place)
    return pa.table([rows.column(name) for name in names], names=list(names))


class TransformedRows:
    """Columns of a schema, each computed on demand; see `read_columns`."""

    def __init__(self, table: pa.Table, schema: Schema, place: str) -> None:
        self.table, self.chains, self.place = table, schema.transforms, place
        self._made: dict[str, pa.Array] = {}

    def column(self, name: str) -> pa.Array:
        if name not in self.chains:
            return one_chunk(self.table[name])
        if name not in self._made:
            self._made[name] = self._apply(self.chains[name], name)
        return self._made[name]

    def before_step(self, name: str, number: int) -> pa.Array:
        """Return a column before one step of its chain, which follows no cross."""
        chain = self.chains[name]
        return self._apply(Chain(chain.sources, chain.steps[:number]), name)

    def _apply(self, chain: Chain, name: str) -> pa.Array:
        columns = [
            one_chunk(self.table[source]) if source == name else self.column(source)
            for source in chain.sources
        ]
        try:
            if len(columns) > 1 or not is_list(columns[0].type):
                return chain(columns)
            offsets = np.concatenate([[0], np.cumsum(list_lengths(columns[0]), dtype=np.int64)])
            return pa.LargeListArray.from_arrays(offsets, chain([columns[0].flatten()]))
        except ValueError as error:
            raise ValueError(f"{self.place}: column '{name}': {error}") from error


def check_types(
    schema: Schema, names: Iterable[str], column_type: Callable[[str], pa.DataType], place: str
) -> None:
    """Check the types of columns, which `column_type` returns by name, against the schema."""
    for name in names:
        if name not in schema.transforms:
            check_type(schema, name, column_type(name), place)
            continue
        kinds = {source: column_type(source) for source in schema.file_columns([name])}
        empty = pa.table({source: pa.array([], kind) for source, kind in kinds.items()})
        check_type(schema, name, read_columns(empty, schema, [name], place)[name].type, place)
        for source, kind in kinds.items():
            kind = kind.value_type if is_list(kind) else kind
            if is_id_type(kind):
                schema.require_id_type(source, kind, place, source)
