"""Sources of features: the last known values of columns by ids, of the package or of a store.

Shapes: K keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.data.schema_columns import FeatureTable
from recsys.data.transforms.steps import SEPARATOR

Types = Mapping[str, pa.Schema]  # of each table, by its name: ids, columns and times


class FeatureSourceError(Exception):
    """A store does not answer; the request may be sent again."""


class FeatureSource(ABC):
    """Looks up features by ids. A subclass reads them from a store of your own.

    Example::

        class MyFeatures(FeatureSource):  # --features.name my_store:MyFeatures
            def __init__(self, types: Types, url: str) -> None:  # --features.options.url URL
                self.types, self.client = types, Client(url)

            def read(self, table: FeatureTable, keys: list[pa.Array]) -> pa.Table:
                rows = self.client.get(table.name, key_texts(keys))
                return table_of_rows(rows, table, self.types)

    `types` are those of the package's own features. `version` is of all values, if there is one.
    """

    version = ""

    @abstractmethod
    def read(self, table: FeatureTable, keys: list[pa.Array]) -> pa.Table:  # K ids each -> [K]
        """Return the columns of a table, and the times of those that have one; null if unknown.

        `keys` are the ids of each column in `table.by`; a key may be null, which is unknown.
        """


def value_columns(table: FeatureTable) -> list[str]:
    """Return the columns that a source returns: those of the table, and their times."""
    return [*table.columns, *table.times.values()]


def joined_keys(keys: list[pa.Array]) -> pa.Array:  # K ids each -> [K]
    """Return one id for the ids of each key: itself, or a text of several; null if one is."""
    if len(keys) == 1:
        return keys[0]
    texts = [ids.cast(pa.large_string()) for ids in keys]
    return pc.binary_join_element_wise(*texts, pa.scalar(SEPARATOR, pa.large_string()))


def key_texts(keys: list[pa.Array]) -> list[str | None]:  # K ids each -> K
    """Return the text of each key, by which stores know it."""
    texts = joined_keys(keys).cast(pa.large_string()).to_pylist()
    return [text if text is None else text.replace(SEPARATOR, ":") for text in texts]


def table_of_rows(rows: list[dict[str, Any]], table: FeatureTable, types: Types) -> pa.Table:
    """Return rows of plain values, by column, in the types of the package."""
    fields = [types[table.name].field(name) for name in value_columns(table)]
    try:
        return pa.Table.from_pylist(rows, pa.schema(fields))
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(
            f"features by {table.name}: {error}; write the types of the data"
        ) from error


def without_old_values(
    values: pa.Table, table: FeatureTable, unix_time: float
) -> dict[str, pa.Array]:
    """Return the columns [K] of a table; null where a value is older than its `max_age`."""
    columns = {}
    for name in table.columns:
        column = values[name].combine_chunks()
        limit = table.max_age_micros.get(name)
        if limit is not None:
            age = np.int64(unix_time * 1_000_000) - values[table.times[name]].to_numpy()
            is_old = ~(age <= limit)  # also without a time
            column = pc.if_else(pa.array(is_old), pa.scalar(None, column.type), column)
        columns[name] = column
    return columns
