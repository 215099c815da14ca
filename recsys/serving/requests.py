"""Requests: values of a user, a history and candidates -> rows of tables, as training reads them.

Requests use the functions that read Parquet (`recsys.data.transforms.columns`,
`recsys.data.parquet.values`), with the same errors. Shapes: N candidates, L events of a history,
P parallel lists, R rows of a column (1 or N), K table rows.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from embeddings.vocabulary.bounded import BoundedVocabulary
from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.data.parquet.values import empty_table, is_list, list_lengths, usable_column
from recsys.data.schema import Schema
from recsys.data.schema_columns import FeatureTable, HistoryColumns
from recsys.data.transforms.columns import check_types, filled, read_columns
from recsys.serving.features.source import FeatureSource
from recsys.storage.location import errors_at

Values = Mapping[str, Any]


def request_columns(
    schema: Schema, pooled: Sequence[str], dense: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the file columns of user and history that these model columns are made of.

    The ids by which columns are looked up come last.
    """
    lists = [
        name for events in schema.histories for name in (events.name, *events.numbers, *events.ids)
    ]
    columns = schema.file_columns([*pooled, *dense])
    for name in columns:  # also those that the loop appends
        if table := schema.lookup_of(name):
            columns += [key for key in table.by if key not in (schema.target_item, *columns)]
    return columns, schema.file_columns(lists)


@dataclass
class RequestValues:
    """File columns of a request: given to the candidates or the user, else looked up by ids."""

    schema: Schema
    features: FeatureSource | None
    user: Values
    lists: Values  # of the candidates; the item's has N values
    unix_time: float
    nulls: dict[str, tuple[int, int]] = field(default_factory=dict)  # values and nulls, by column
    _looked_up: dict[str, dict[str, pa.Array]] = field(default_factory=dict)  # by table

    def column(self, name: str) -> pa.Array:
        """Return N values of the candidates, or one of the user."""
        if name in self.lists:
            num_rows = len(self.lists[self.schema.target_item])
            values = value_list(self.lists, name, "candidates", num_rows, "candidates")
            return array_of(values, name, "candidates")
        if name in self.user:
            if self.schema.is_of_items(name):
                raise ValueError(
                    f"user: '{name}' is a column of the items, and one value would be that of all "
                    "candidates; leave it out, or give the candidates a list"
                )
            return array_of([self.user[name]], name, "user")
        table = self.schema.lookup_of(name)
        if table is None or self.features is None:
            raise ValueError(f"user: lacks '{name}'; give it to the user or the candidates")
        if table.name not in self._looked_up:
            keys = self._keys(table)
            self._looked_up[table.name] = self.features.lookup(table, keys, self.unix_time)
        return self._looked_up[table.name][name]

    def columns(self, names: Sequence[str]) -> tuple[dict[str, pa.Array], str]:
        """Return columns of equal lengths, and their origin for messages.

        A user's value is repeated for each candidate.
        """
        columns = {name: self.column(name) for name in names}
        self.nulls |= {name: (len(values), values.null_count) for name, values in columns.items()}
        length = next((size for size in map(len, columns.values()) if size != 1), 1)
        for name, values in columns.items():
            if len(values) != length:
                columns[name] = pa.repeat(values[0], length)
        for name in names:
            table = self.schema.lookup_of(name)
            if table is not None and name not in self.lists and name not in self.user:
                return columns, f"features by {table.name}"
        return columns, "candidates" if self.lists.keys() & set(names) else "user"

    def _keys(self, table: FeatureTable) -> list[pa.Array]:
        columns, origin = self.columns(table.by)
        with errors_at(f"{origin}: ids of {table.by}", pa.ArrowException):
            fills = self.schema.fills
            return [filled(values, name, fills) for name, values in columns.items()]


def array_of(values: Sequence[Any], name: str, origin: str) -> pa.Array:
    """Return the values of a file column as an array, of the type of the first."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, UnicodeEncodeError) as error:
        is_large = isinstance(error, OverflowError)
        problem = "an integer does not fit 64 bits; write a smaller one" if is_large else error
        raise ValueError(f"{origin}: column '{name}': {problem}") from error


@dataclass(frozen=True)
class TableRows:
    """Rows of a table for each value of a column."""

    rows: np.ndarray  # int64 [K], grouped by value
    lengths: np.ndarray  # int64 [R]


@dataclass(frozen=True)
class HistoryRows:
    """A history of a request."""

    # By column, of the events and of each list beside them: int64 [L], or several rows per event.
    ids: dict[str, np.ndarray]
    numbers: np.ndarray  # float32 [L, P]


@dataclass(frozen=True)
class RequestRows:
    """A request as inputs of the model."""

    pooled: dict[str, TableRows]  # by column, of 1 or N values
    dense: dict[str, np.ndarray]  # float32 [1 or N] by column
    target: np.ndarray  # int64 [N]
    histories: list[HistoryRows]  # in the order of the schema
    # Values and nulls among them of each column of the files, of the user and the candidates.
    nulls: dict[str, tuple[int, int]] = field(default_factory=dict)


class RequestReader:
    """Reads requests by the schema of a package; `bounded` has learned maps of raw ids."""

    def __init__(
        self,
        schema: Schema,
        pooled: Sequence[str],
        bounded: Mapping[str, BoundedVocabulary],
        dense: Sequence[str] | None = None,
        features: FeatureSource | None = None,
    ) -> None:
        self.schema, self.pooled, self.bounded = schema, pooled, bounded
        self.features, self.clock = features, time.time
        self.dense = schema.of_kind("dense") if dense is None else dense
        self._checked: set[tuple[object, ...]] = set()  # columns with types that fit the schema

    def __call__(
        self, user: Values, history: Values | Sequence[Any], candidates: Values | Sequence[Any]
    ) -> RequestRows:
        """Return the rows of a request, as `Scorer.score` describes it; errors name a column."""
        if not isinstance(user, Mapping):
            raise ValueError(f"user: is {type(user).__name__}; give a mapping of column to value")
        item = self.schema.target_item
        lists = candidates if isinstance(candidates, Mapping) else {item: candidates}
        lists = {**lists, item: value_list(lists, item, "candidates")}
        request = RequestValues(self.schema, self.features, user, lists, self.clock())
        target = self._table_rows(item, {item: request.column(item)}, "candidates").rows
        histories, sources = self.histories(history), self.schema.file_columns
        pooled = {
            name: self._table_rows(name, *request.columns(sources([name]))) for name in self.pooled
        }
        dense = {
            name: self._column(name, *request.columns(sources([name]))).to_numpy(False)
            for name in self.dense
        }
        return RequestRows(pooled, dense, target, histories, request.nulls)

    def unknown_ids(self, rows: RequestRows) -> dict[str, tuple[int, int]]:
        """Return the number of ids, and of unknown ones, of each column that may have some."""
        columns = {name: column.rows for name, column in rows.pooled.items()}
        columns |= {name: ids for events in rows.histories for name, ids in events.ids.items()}
        columns[self.schema.target_item] = rows.target
        counts = {}
        for name, ids in columns.items():
            table = self.schema.table_of(name)
            vocabulary = self.bounded.get(table) or self.schema.vocabularies.get(table)
            if isinstance(vocabulary, BoundedVocabulary | ExactVocabulary):
                counts[name] = len(ids), int((ids == vocabulary.unknown_row).sum())
        return counts

    def item_ids(self, limit: int) -> list[Any]:
        """Return the ids of all items by row; a ValueError says if they are too many or unknown."""
        item = self.schema.target_item
        vocabulary = self.schema.vocabularies.get(item)
        exact = vocabulary if isinstance(vocabulary, ExactVocabulary) else None
        count = self.schema.num_items if exact is None else len(exact)
        if count > limit:
            raise ValueError(f"all items are {count}; the limit is {limit}: retrieve some first")
        if exact is not None:
            return exact.ids.to_pylist()
        if self.schema.vocabulary_of(item) is not None:
            raise ValueError(f"ids of '{item}' are not in the package, only a map; list some")
        return list(range(count))

    def histories(self, history: Values | Sequence[Any]) -> list[HistoryRows]:
        histories = self.schema.histories
        if not isinstance(history, Mapping):
            history = value_list({"items": history}, "items", "history")
        if not len(history):
            history = {name: [] for name in request_columns(self.schema, [], [])[1]}
        elif not histories:
            raise ValueError("history: the model was trained without a history; give none")
        lists = history if isinstance(history, Mapping) else {histories[0].name: history}
        lists = {name: [] if values is None else values for name, values in lists.items()}
        return [self._history(events, lists) for events in histories]

    def _history(self, history: HistoryColumns, lists: Values) -> HistoryRows:
        length = len(value_list(lists, history.name, "history"))

        def file_values(column: str) -> dict[str, pa.Array]:
            """Return the file columns that a column of events is made of, each as one list."""
            arrays, unit = {}, f"items of '{history.name}'"
            for name in self.schema.file_columns([column]):
                if name not in lists and self.schema.lookup_of_list(name) is not None:
                    arrays[name] = self._lookup_list(name, lists[history.name])
                else:
                    values = value_list(lists, name, "history", length, unit)
                    arrays[name] = array_of([values], name, "history")
            return arrays

        numbers = [
            self._column(name, file_values(name), "history").flatten().to_numpy(False)
            for name in history.numbers
        ]
        ids = {
            name: self._table_rows(name, file_values(name), "history").rows
            for name in (history.name, *history.ids)
        }
        empty = np.zeros((length, 0), np.float32)
        return HistoryRows(ids, np.stack(numbers, axis=1) if numbers else empty)

    def _lookup_list(self, name: str, items: Sequence[Any]) -> pa.Array:  # [L] -> one list of L
        table = self.schema.lookup_of_list(name)
        assert table is not None and self.features is not None
        ids = array_of(items, self.schema.target_item, "history")
        column = self.features.lookup(table, [ids], self.clock())[table.beside[name]]
        return pa.ListArray.from_arrays(pa.array([0, len(column)], pa.int32()), column)

    def _table_rows(self, name: str, arrays: Mapping[str, pa.Array], origin: str) -> TableRows:
        array = self._column(name, arrays, origin)
        lengths = list_lengths(array) if is_list(array.type) else np.ones(len(array), np.int64)
        flat = array.flatten() if is_list(array.type) else array
        rows = np.array(flat.to_numpy(zero_copy_only=False))  # a copy, as torch needs to write it
        vocabulary = self.bounded.get(self.schema.table_of(name))
        if vocabulary is not None:
            rows = vocabulary.rows_of(torch.from_numpy(rows), step=0, training=False).numpy()
        return TableRows(rows, lengths)

    def _column(self, name: str, arrays: Mapping[str, pa.Array], origin: str) -> pa.Array:
        arrays = {source: self._typed(array, source, name) for source, array in arrays.items()}
        # The check reads an empty table, which costs as much as the few values of a request.
        types = (name, *((source, array.type) for source, array in arrays.items()))
        if types not in self._checked:
            schema = copy(self.schema)  # a request's types are not those of the next
            schema.id_types = dict(schema.id_types)
            check_types(schema, [name], lambda source: arrays[source].type, origin)
            self._checked.add(types)
        table = read_columns(pa.table(arrays), self.schema, [name], origin)

        def refuse(_: str, rows: np.ndarray, reason: str, message: Callable[[int], str]) -> None:
            if rows.any():
                number = int(rows.argmax())
                hint = "; give the request a value" if origin.startswith("features") else ""
                problem = f"column '{name}', value {number}: {message(number)}{hint}"
                raise ValueError(f"{origin}: {problem}")

        return usable_column(table, name, self.schema, refuse)

    def _typed(self, array: pa.Array, name: str, column: str) -> pa.Array:
        """Cast a column of nulls alone to its type in files; transforms and raw ids take any."""
        kind = array.type
        if not pa.types.is_null(kind.value_type if is_list(kind) else kind):
            return array
        if column in self.schema.transforms or self.schema.vocabulary_of(name) is not None:
            is_list_column = self.schema.columns[column].kind in ("ids", "sequence")
            expected = pa.list_(pa.null()) if is_list_column else pa.null()
        else:
            expected = empty_table(self.schema, [name]).schema.field(name).type
        is_castable = pa.types.is_null(kind) or is_list(expected)
        return array.cast(expected) if is_castable and kind != expected else array


def value_list(
    lists: Values, name: str, origin: str, length: int | None = None, unit: str = ""
) -> Sequence[Any]:
    """Return the list of values of a column; with `length`, it must have one for each `unit`."""
    if name not in lists:
        raise ValueError(f"{origin}: lacks '{name}'; give a list")
    values = lists[name]
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if isinstance(values, str | bytes | bytearray) or not isinstance(values, Sequence):
        raise ValueError(f"{origin}: '{name}' is no list; give one value for each")
    if length is not None and len(values) != length:
        raise ValueError(
            f"{origin}: '{name}' has {len(values)} values for {length} {unit}; give one for each"
        )
    return values
