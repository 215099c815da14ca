"""Values of histories: those of all events one after another, and lists as slices of them.

A sample's list is a slice, given by its begin and its length, of the values of its user's events.
Slices are a few bytes where lists are hundreds: on one machine samples are sorted and split with
slices of files, and get their lists as they are written.

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


def begin_of(history: str) -> str:
    """Return the column with the place of the first value of each sample's slice."""
    return f"/begin {history}"


def length_of(history: str) -> str:
    """Return the column with the length of each sample's slice."""
    return f"/length {history}"


def slice_columns(histories: Iterable[str]) -> dict[str, pa.DataType]:
    """Return the columns with the slices of histories; narrow ones, as samples are sorted."""
    types = {begin_of: pa.int64(), length_of: pa.int32()}
    return {of(name): kind for name in histories for of, kind in types.items()}


def null_stand_in(kind: pa.DataType) -> int | str:
    """Return what stands for a null id until lists are made: files of values have no nulls."""
    return "" if pa.types.is_string(kind) else NULL_ID


def lists_of(
    samples: Mapping[str, pa.Array], name: str, history: History, values: dict[str, pa.Array]
) -> dict[str, pa.Array]:  # samples [S] each, values [E] each -> lists [S] each
    """Return the lists of a history of samples, by column.

    Args:
        samples: their `ts`, and the columns `begin_of` and `length_of` this history.
        name: of the history.
        history: its settings.
        values: of the history and the columns beside it; those beside `age` are times of events.
    """
    begin, length = (samples[of(name)].to_numpy() for of in (begin_of, length_of))
    offsets = np.concatenate([[0], np.cumsum(length)])
    places = pa.array(np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], length))
    bounds = pa.array(offsets, pa.int32())
    lists = {}
    for column, of in values.items():
        chosen = pc.take(of, places, boundscheck=False)
        if column != name and history.parallel[column].column == AGE:
            chosen = _ages(np.repeat(samples["ts"].to_numpy(), length) - chosen.to_numpy())
        elif pa.types.is_dictionary(chosen.type):
            chosen = chosen.cast(chosen.type.value_type)
        if column != name and not pa.types.is_floating(chosen.type):
            is_null = pc.equal(chosen, null_stand_in(chosen.type))
            chosen = pc.if_else(is_null, None, chosen)
        lists[column] = pa.ListArray.from_arrays(bounds, chosen)
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
    """Values of histories in files of a folder, which are mapped to memory when they are read.

    folder: for the files; must not exist.
    histories: their settings, by name.
    """

    folder: Path
    histories: dict[str, History]
    _lengths: dict[str, int] = field(default_factory=dict)
    _types: dict[str, pa.DataType] = field(default_factory=dict)
    _texts: dict[str, dict[str, int]] = field(default_factory=dict)

    def append(self, name: str, values: dict[str, pa.Array]) -> int:  # values [E] each
        """Write more values of a history, and return the place of the first."""
        self.folder.mkdir(exist_ok=True)
        for column, of in values.items():
            self._types[column] = of.type
            numbers = self._codes(column, of) if pa.types.is_string(of.type) else of.to_numpy()
            with self._path(column).open("ab") as file:
                file.write(np.ascontiguousarray(numbers).data)
        first = self._lengths.get(name, 0)
        self._lengths[name] = first + len(values[name])
        return first

    def with_lists(self, batch: pa.RecordBatch, columns: Iterable[str]) -> pa.RecordBatch:
        """Return columns of rows; those that the rows lack are lists by their slices.

        Args:
            batch: rows with `MOMENT`, and the columns `begin_of` and `length_of` each history.
            columns: names in the order of the result.
        """
        own = dict(zip(batch.schema.names, batch.columns, strict=True))
        samples = {**own, "ts": own[MOMENT]}
        for name, history in self.histories.items():
            own |= lists_of(samples, name, history, self._values[name])
        return pa.record_batch({name: own[name] for name in columns})

    @cached_property
    def _values(self) -> dict[str, dict[str, pa.Array]]:
        """Return all values, by history and column."""
        return {
            name: {column: self._mapped(column) for column in (name, *history.parallel)}
            for name, history in self.histories.items()
        }

    def _mapped(self, column: str) -> pa.Array:
        """Return the values of a column, mapped to memory."""
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
        """Return the place of each text among those of the column, new ones last."""
        known = self._texts.setdefault(column, {})
        encoded = values.dictionary_encode()
        codes = [known.setdefault(text, len(known)) for text in encoded.dictionary.to_pylist()]
        return np.array(codes, np.int32)[encoded.indices.to_numpy()]
