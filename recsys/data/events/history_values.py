"""Values of histories: those of all events one after another, and lists as slices of them.

Slices are a few bytes where lists are hundreds, so samples are sorted with slices.

Shapes: E events with the actions of a history, S samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embeddings.vocabulary.fixed import NULL_ID
from recsys.data.events.settings import History
from recsys.data.events.times import MICROS

DAY = 86_400 * MICROS["s"]
AGE = "age"
MOMENT = "/ts"  # a column of samples; names with / are none of the dataset's


def begin_column(history: str) -> str:
    """Return the column with the place of the first value of each sample's slice."""
    return f"/begin {history}"


def length_column(history: str) -> str:
    """Return the column with the length of each sample's slice."""
    return f"/length {history}"


def slice_columns(histories: Iterable[str]) -> dict[str, pa.DataType]:
    """Return the columns with the slices of histories; narrow ones, as samples are sorted."""
    types: dict[str, pa.DataType] = {}
    for name in histories:
        types |= {begin_column(name): pa.int64(), length_column(name): pa.int32()}
    return types


def null_stand_in(kind: pa.DataType) -> int | str:
    """Return what stands for a null id until lists are made: files of values have no nulls."""
    return "" if pa.types.is_string(kind) else NULL_ID


def history_lists(
    samples: Mapping[str, pa.Array], name: str, history: History, values: dict[str, pa.Array]
) -> dict[str, pa.Array]:  # samples [S] each, values [E] each -> lists [S] each
    """Return the lists of a history of samples, by column.

    `samples` have `ts`, `begin_column`, `length_column`; values beside `age` are times of events.
    """
    begin, length = samples[begin_column(name)].to_numpy(), samples[length_column(name)].to_numpy()
    offsets = np.concatenate([[0], np.cumsum(length)])
    places = pa.array(np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], length))
    bounds = pa.array(offsets, pa.int32())
    lists = {}
    for column, column_values in values.items():
        items = pc.take(column_values, places, boundscheck=False)
        if column != name and history.parallel[column].column == AGE:
            items = _ages(np.repeat(samples["ts"].to_numpy(), length) - items.to_numpy())
        elif pa.types.is_dictionary(items.type):
            items = items.cast(items.type.value_type)
        if column != name and not pa.types.is_floating(items.type):
            is_null = pc.equal(items, null_stand_in(items.type))
            items = pc.if_else(is_null, None, items)
        lists[column] = pa.ListArray.from_arrays(bounds, items)
    return lists


def _ages(ago: np.ndarray) -> pa.Array:  # int64, microseconds -> float32
    """Return ages as numbers: a day is 0.15, a hundred days are 1, as magnitudes matter."""
    ages = ago / DAY
    ages += 1
    np.log10(ages, out=ages)
    ages /= 2
    return pa.array(ages.astype(np.float32))


@dataclass
class HistoryFiles:
    """Values of histories in files of a new folder, which are mapped to memory when read."""

    folder: Path
    histories: dict[str, History]
    _lengths: dict[str, int] = field(default_factory=dict)
    _types: dict[str, pa.DataType] = field(default_factory=dict)
    _texts: dict[str, dict[str, int]] = field(default_factory=dict)

    def append(self, name: str, values: dict[str, pa.Array]) -> int:  # values [E] each
        """Write more values of a history, and return the place of the first."""
        self.folder.mkdir(exist_ok=True)
        for column, array in values.items():
            self._types[column] = array.type
            is_text = pa.types.is_string(array.type)
            numbers = self._codes(column, array) if is_text else array.to_numpy()
            with self._path(column).open("ab") as file:
                file.write(np.ascontiguousarray(numbers).data)
        first = self._lengths.get(name, 0)
        self._lengths[name] = first + len(values[name])
        return first

    def with_lists(self, batch: pa.RecordBatch, columns: Iterable[str]) -> pa.RecordBatch:
        """Return columns of rows in this order; those that rows lack are lists by their slices."""
        arrays = dict(zip(batch.schema.names, batch.columns, strict=True))
        samples = {**arrays, "ts": arrays[MOMENT]}
        for name, history in self.histories.items():
            arrays |= history_lists(samples, name, history, self._values[name])
        return pa.record_batch({name: arrays[name] for name in columns})

    @cached_property
    def _values(self) -> dict[str, dict[str, pa.Array]]:
        return {
            name: {column: self._mapped(column) for column in (name, *history.parallel)}
            for name, history in self.histories.items()
        }

    def _mapped(self, column: str) -> pa.Array:
        path, kind = self._path(column), self._types[column]
        if not path.stat().st_size:
            return pa.array([], kind)
        stored = pa.int32() if column in self._texts else kind
        mapped = np.memmap(path, stored.to_pandas_dtype(), mode="r")
        values = pa.array(mapped)
        if column in self._texts:
            return pa.DictionaryArray.from_arrays(values, list(self._texts[column]))
        return values

    def _path(self, column: str) -> Path:
        return self.folder / f"h_{column}"

    def _codes(self, column: str, values: pa.Array) -> np.ndarray:  # int32 [E]
        places = self._texts.setdefault(column, {})
        encoded = values.dictionary_encode()
        codes = [places.setdefault(text, len(places)) for text in encoded.dictionary.to_pylist()]
        return np.array(codes, np.int32)[encoded.indices.to_numpy()]
