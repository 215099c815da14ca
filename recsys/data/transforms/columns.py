"""Compute the columns of a schema from the columns of a file or request."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embeddings.vocabulary.fixed import is_id_type
from recsys.data.parquet.values import check_type, is_list, list_lengths, one_chunk
from recsys.data.schema import Schema
from recsys.data.transforms.chain import Chain, transformed_sources
from recsys.data.transforms.steps import DATE_TEXT, fill
from recsys.storage.location import errors_at


def read_columns(table: pa.Table, schema: Schema, names: Sequence[str], where: str) -> pa.Table:
    """Return columns `names`, filled and transformed, from a table of the file's columns."""
    if not {*schema.transforms, *schema.fills} & set(names):
        return table.select(names)
    rows = TransformedRows(table, schema, where)
    return pa.table([rows.column(name) for name in names], names=list(names))


class TransformedRows:
    """Columns of a schema, each computed when it is first asked for; see `read_columns`."""

    def __init__(self, table: pa.Table, schema: Schema, where: str) -> None:
        self.table, self.chains, self.where = table, schema.transforms, where
        self._fills = schema.fills
        self._computed: dict[str, pa.Array] = {}

    def column(self, name: str) -> pa.Array:
        if name not in self.chains:
            return self._filled(name)
        if name not in self._computed:
            self._computed[name] = self._apply(self.chains[name], name)
        return self._computed[name]

    def _filled(self, name: str) -> pa.Array:
        with errors_at(f"{self.where}: column '{name}': fill", pa.ArrowException):
            return filled(one_chunk(self.table[name]), name, self._fills)

    def before_step(self, name: str, number: int) -> pa.Array:
        """Return a column before step `number` of its chain; no step before it may be a cross."""
        chain = self.chains[name]
        return self._apply(Chain(chain.sources, chain.steps[:number]), name)

    def _apply(self, chain: Chain, name: str) -> pa.Array:
        columns = [
            self._filled(source) if source == name else self.column(source)
            for source in chain.sources
        ]
        with errors_at(f"{self.where}: column '{name}'"):
            if len(columns) > 1 or not is_list(columns[0].type):
                return chain(columns)
            return _with_values(columns[0], chain([columns[0].flatten()]))


def filled(values: pa.Array, name: str, fills: Mapping[str, int | float | str]) -> pa.Array:
    """Return the values of a column with null and NaN replaced by its fill, if it has one."""
    if name not in fills:
        return values
    flat = values.flatten() if is_list(values.type) else values
    if pa.types.is_dictionary(flat.type):
        flat = flat.dictionary_decode()
    if pa.types.is_floating(flat.type):
        flat = pc.if_else(pc.is_nan(flat), pa.scalar(None, flat.type), flat)
    elif _is_between(fills[name], flat.type):
        flat = flat.cast(pa.float64())
    flat = fill(flat, fills[name])
    return _with_values(values, flat) if is_list(values.type) else flat


def _is_between(fill: int | float | str, kind: pa.DataType) -> bool:
    """Return whether a fill is a number that an integer or boolean column cannot hold."""
    if pa.types.is_boolean(kind):
        return fill not in (0, 1)
    return pa.types.is_integer(kind) and isinstance(fill, float)


def _with_values(lists: pa.Array, values: pa.Array) -> pa.Array:
    """Return lists of the same lengths with other values."""
    offsets = np.concatenate([[0], np.cumsum(list_lengths(lists), dtype=np.int64)])
    return pa.LargeListArray.from_arrays(offsets, values)


def check_types(
    schema: Schema, names: Iterable[str], column_type: Callable[[str], pa.DataType], where: str
) -> None:
    """Raise a ValueError if a column's type, from `column_type(name)`, differs from the schema."""
    for name in names:
        if name not in schema.transforms and name not in schema.fills:
            check_type(schema, name, column_type(name), where)
            continue
        kinds = {source: column_type(source) for source in schema.file_columns([name])}
        empty = pa.table({source: pa.array([], kind) for source, kind in kinds.items()})
        check_type(schema, name, read_columns(empty, schema, [name], where)[name].type, where)
        for source, kind in kinds.items() if name in schema.transforms else ():
            kind = kind.value_type if is_list(kind) else kind
            if pa.types.is_timestamp(kind):
                _refuse_date(schema.transforms[name], schema.fills.get(source), name, where)
            if is_id_type(kind) or (pa.types.is_boolean(kind) and _is_crossed(name, schema)):
                schema.require_id_type(source, kind, where, source)


def _refuse_date(chain: Chain, fill: object, name: str, where: str) -> None:
    """Raise a ValueError if a date fills times: files read it in UTC, requests in the zone."""
    zone = next((step.settings["zone"] for step in chain.steps if "zone" in step.settings), "UTC")
    values = [fill, *(step.settings["value"] for step in chain.steps if step.name == "fill")]
    dates = [value for value in values if re.match(DATE_TEXT, str(value))]
    if dates and zone != "UTC":
        raise ValueError(
            f"{where}: column '{name}': its fill '{dates[0]}' is a date, and the column has times; "
            f"write a time, such as '{dates[0]}T00:00'"
        )


def _is_crossed(name: str, schema: Schema) -> bool:
    """Return whether `cross` makes a column; it turns true and 1 into different texts."""
    chains = schema.transforms
    sources = transformed_sources(name, chains)
    return chains[name].joins or any(_is_crossed(source, schema) for source in sources)
