"""Find the events that a sample knows, and store histories as slices of files of values.

Per key, the events before a moment are a prefix, which one binary search locates. Samples are
sorted with slices of a few bytes, not with lists of hundreds of bytes.
Shapes: N rows of a chunk, E events of a chunk that match a history, S samples of a chunk.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embeddings.vocabulary.fixed import NULL_ID
from recsys.data.events.settings import History
from recsys.data.events.sql import FOREVER
from recsys.data.events.times import DAY


def chunks_by_key(batches: Iterable[pa.RecordBatch], keys: Sequence[str]) -> Iterator[pa.Table]:
    """Yield chunks of sorted batches such that all rows of a key are in one chunk."""
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        if not batch.num_rows:
            continue
        start = int(np.flatnonzero(_starts(batch, keys))[-1])
        if start:
            pending.append(batch.slice(0, start))
        elif pending and all(
            pending[-1].column(key)[-1].as_py() == batch.column(key)[0].as_py() for key in keys
        ):
            pending.append(batch)
            continue
        if pending:
            yield pa.Table.from_batches(pending).combine_chunks()
        pending = [batch.slice(start)]
    if pending:
        yield pa.Table.from_batches(pending).combine_chunks()


def _starts(batch: pa.RecordBatch | pa.Table, keys: Sequence[str]) -> np.ndarray:  # bool [N]
    starts = np.zeros(batch.num_rows, bool)
    starts[:1] = True
    for key in keys:
        values = batch.column(key)
        changes = pc.not_equal(values.slice(1), values.slice(0, batch.num_rows - 1))
        starts[1:] |= np.asarray(changes.fill_null(True))
    return starts


def key_numbers(chunk: pa.Table, keys: Sequence[str]) -> np.ndarray:  # chunk [N] -> int64 [N]
    """Return the number of each row's key, counted 0, 1, 2 ... in order of the keys."""
    return np.cumsum(_starts(chunk, keys)) - 1


def by_position(chunk: pa.Table, events: np.ndarray) -> np.ndarray:  # int64 [E], rows -> [E]
    """Sort events of a chunk that is sorted by `uid`, `ts` and `iid` by `position` as well.

    A sort of all rows by `position`, too, would take a third longer.
    """
    group = np.cumsum(_starts(chunk, ["uid", "ts", "iid"]))[events]
    is_tied = np.zeros(len(events), bool)
    is_tied[1:] = np.diff(group) == 0
    is_tied[:-1] |= is_tied[1:]
    if is_tied.any():
        rows, events = events[is_tied], events.copy()
        position = chunk["position"].take(pa.array(rows)).to_numpy()
        events[is_tied] = rows[np.lexsort([position, group[is_tied]])]
    return events


class Moments:
    """Finds the events that each sample of a chunk knows.

    `chunk` [N] has both, sorted by key and `ts`, without null keys. `samples`, bool [N], is a mask.
    """

    def __init__(self, chunk: pa.Table, keys: Sequence[str], samples: np.ndarray) -> None:
        self._key = key_numbers(chunk, keys)  # [N]
        self._row_time, self._sample_rows = chunk["ts"].to_numpy(), np.flatnonzero(samples)
        self._time = self._row_time[samples]  # [S]
        self._sample_key = self._key[samples]  # [S]
        self._arrived: np.ndarray | None = None
        if "arrived" in chunk.column_names:
            arrived = chunk["arrived"].fill_null(-FOREVER).to_numpy()  # [N]; null in samples
            self._arrived = arrived if (arrived > self._row_time).any() else None

    @cached_property
    def _times(self) -> np.ndarray:
        """The distinct times of the rows, ascending."""
        ordered = np.sort(self._row_time)  # numpy.unique builds a hash table first and is slower
        return ordered[np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))]

    @cached_property
    def _time_code(self) -> np.ndarray:  # int64 [N], ascending
        rank = np.searchsorted(self._times, self._row_time)
        return self._key * (len(self._times) + 1) + rank

    def _first_rows(self, *columns: np.ndarray) -> np.ndarray:  # columns [N] -> int64 [S]
        """Return for each sample the first row that equals it in the (sorted) columns."""
        is_first = np.logical_or.reduce([np.diff(c, prepend=c[:1] - 1) != 0 for c in columns])
        return np.flatnonzero(is_first)[np.cumsum(is_first)[self._sample_rows] - 1]

    def _count_earlier(self, events: np.ndarray, delay: int) -> np.ndarray:  # [E] -> [S]
        """Count `events` of this and earlier keys that are earlier than each sample by `delay`."""
        if not delay:
            return np.searchsorted(events, self._first_rows(self._key, self._row_time))
        rank = np.searchsorted(self._times, self._time - delay)
        time_code = self._sample_key * (len(self._times) + 1) + rank
        return np.searchsorted(self._time_code[events], time_code)

    def known(
        self, events: np.ndarray, delay: int, within: int | None
    ) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
        """Return the events in each sample's window that had arrived by its time.

        The window ends `delay` microseconds before the sample and is `within` long (None:
        unbounded). `events` int64 [E] are ascending rows. Returns begin and end, int64 [S] each, of
        the events before the first unknown one, and by sample the positions of known later events.
        """
        end = self._count_earlier(events, delay)
        if within is None:  # the window has all events of the sample's key
            begin = np.searchsorted(events, self._first_rows(self._key))
        else:
            begin = self._count_earlier(events, delay + within)
        if self._arrived is None:
            return begin, end, {}
        known_from = np.maximum(self._arrived[events], self._row_time[events] + delay + 1)  # [E]
        moments = np.unique(known_from)
        codes = self._key[events] * (len(moments) + 1) + np.searchsorted(moments, known_from)
        rank = np.searchsorted(moments, self._time, side="right")
        cut = self._sample_key * (len(moments) + 1) + rank  # [S]
        gap = np.searchsorted(np.maximum.accumulate(codes), cut)  # first event that is not known
        num_known = np.searchsorted(np.sort(codes), cut)
        late: dict[int, np.ndarray] = {}
        for sample in np.flatnonzero(num_known > gap).tolist():
            later = np.arange(max(begin[sample], gap[sample]), end[sample])
            later = later[known_from[later] <= self._time[sample]]
            if len(later):
                late[sample] = later
        return np.minimum(begin, gap), gap, late


AGE = "age"
MOMENT = "/ts"  # a column of samples; columns of datasets have no / in their names


def slice_names(history: str) -> tuple[str, str]:
    """Return the names of the columns with a slice's first position and its length."""
    return f"/begin {history}", f"/length {history}"


def slice_columns(histories: Iterable[str]) -> dict[str, pa.DataType]:
    """Return the columns with the slices of histories, and their narrow types."""
    types: dict[str, pa.DataType] = {}
    for name in histories:
        types |= zip(slice_names(name), (pa.int64(), pa.int32()))
    return types


def null_stand_in(kind: pa.DataType) -> int | str:
    """Return the value that replaces a null id in files of values, which have no nulls."""
    return "" if pa.types.is_string(kind) else NULL_ID


def history_lists(
    samples: Mapping[str, pa.Array], name: str, history: History, values: dict[str, pa.Array]
) -> dict[str, pa.Array]:  # samples [S] each, values [E] each -> lists [S] each
    """Return the lists of a history and its parallel lists, by column.

    `samples` have `ts` and `slice_names`. Values of a list of ages are times of events.
    """
    begin, length = (samples[column].to_numpy() for column in slice_names(name))
    offsets = np.concatenate([[0], np.cumsum(length)])
    indices = pa.array(np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], length))
    bounds = pa.array(offsets, pa.int32())
    lists = {}
    for column, column_values in values.items():
        items = pc.take(column_values, indices, boundscheck=False)
        if column != name and history.parallel[column].column == AGE:
            items = _ages(np.repeat(samples["ts"].to_numpy(), length) - items.to_numpy())
        elif pa.types.is_dictionary(items.type):
            items = items.cast(items.type.value_type)
        if column != name and not pa.types.is_floating(items.type):
            items = pc.if_else(pc.equal(items, null_stand_in(items.type)), None, items)
        lists[column] = pa.ListArray.from_arrays(bounds, items)
    return lists


def _ages(ago: np.ndarray) -> pa.Array:  # int64, microseconds -> float32
    """Return ages on a logarithmic scale: a day is 0.15, a hundred days are 1."""
    ages = ago / DAY
    ages += 1
    np.log10(ages, out=ages)
    ages *= 0.5
    return pa.array(ages.astype(np.float32))


@dataclass
class HistoryFiles:
    """Values of histories in files of a new folder; reading maps the files into memory."""

    folder: Path
    histories: dict[str, History]
    _lengths: dict[str, int] = field(default_factory=dict)
    _types: dict[str, pa.DataType] = field(default_factory=dict)
    _texts: dict[str, dict[str, int]] = field(default_factory=dict)

    def append(self, name: str, values: dict[str, pa.Array]) -> int:  # values [E] each
        """Append values of a history, and return the position of the first."""
        self.folder.mkdir(exist_ok=True)
        for column, array in values.items():
            self._types[column] = array.type
            if pa.types.is_string(array.type):
                codes, encoded = self._texts.setdefault(column, {}), array.dictionary_encode()
                texts = encoded.dictionary.to_pylist()
                codes_of_texts = [codes.setdefault(text, len(codes)) for text in texts]
                array = pa.array(codes_of_texts, pa.int32()).take(encoded.indices)
            with (self.folder / f"h_{column}").open("ab") as file:
                file.write(np.ascontiguousarray(array.to_numpy()).data)
        first = self._lengths.get(name, 0)
        self._lengths[name] = first + len(values[name])
        return first

    def with_lists(self, batch: pa.RecordBatch, columns: Iterable[str]) -> pa.RecordBatch:
        """Return rows with `columns` in this order; missing columns are lists made from slices."""
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
        path, kind = self.folder / f"h_{column}", self._types[column]
        texts = self._texts.get(column)
        if not path.stat().st_size:
            return pa.array([], kind)
        stored = kind if texts is None else pa.int32()
        values = pa.array(np.memmap(path, stored.to_pandas_dtype(), mode="r"))
        return values if texts is None else pa.DictionaryArray.from_arrays(values, list(texts))
