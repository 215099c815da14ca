"""Adds histories and counts of earlier events to samples.

Samples and events of a key lie together in time; see `as_of`. Samples pass with their columns,
events do not.

Shapes: N rows of a chunk, E events of them that match, S samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from recsys.data.events.as_of import Moments, whole_keys
from recsys.data.events.history_values import (
    AGE,
    HistoryFiles,
    begin_of,
    length_of,
    lists_of,
    null_stand_in,
)
from recsys.data.events.settings import Count, History, Parallel
from recsys.data.events.times import duration
from recsys.data.parquet.values import one_chunk

SETS = "/sets"
SAMPLES_AT_ONCE = 1 << 16  # samples whose histories are in memory at a time


@dataclass(frozen=True)
class AddPast:
    """Maps sorted chunks of samples and events to the samples with histories and counts.

    keys: columns that events and samples share.
    histories, counts: what to add.
    lists: types of the histories and the lists beside them, by name.
    schema: of the result; its first columns are those of samples.
    files: take the values of histories, of which samples then have slices; None: samples have
        lists.
    """

    keys: list[str]
    histories: dict[str, History]
    counts: dict[str, Count]
    lists: dict[str, pa.DataType]
    schema: pa.Schema
    files: HistoryFiles | None = None

    @property
    def sets(self) -> list[list[str] | None]:
        """Return the sets of actions of histories and counts, each once.

        An event's column `SETS` has a bit for each that has its action, and is 0 for samples.
        """
        chosen = [of.actions for of in self.histories.values()]
        chosen += [of.actions for of in self.counts.values()]
        chosen += [of.per for of in self.counts.values() if of.per is not None]
        return [actions for place, actions in enumerate(chosen) if actions not in chosen[:place]]

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the samples of each chunk."""
        for chunk in whole_keys(batches, self.keys):
            is_sample = chunk[SETS].to_numpy() == 0
            if is_sample.any():
                yield from self._of_chunk(chunk, is_sample)

    def _of_chunk(self, chunk: pa.Table, is_sample: np.ndarray) -> Iterator[pa.RecordBatch]:
        rows = np.flatnonzero(is_sample)
        moments = Moments(chunk, self.keys, is_sample)
        added = {f"n_{name}": self._count(chunk, moments, of) for name, of in self.counts.items()}
        values: dict[str, dict[str, pa.Array]] = {}
        for name, of in self.histories.items():
            events, begin, length = self._slices(chunk, moments, of)
            values[name] = self._values(chunk, name, events)
            first = 0 if self.files is None else self.files.append(name, values[name])
            added[begin_of(name)] = begin + first
            added[length_of(name)] = length.astype(np.int32)
        for first in range(0, len(rows), SAMPLES_AT_ONCE):
            here = slice(first, first + SAMPLES_AT_ONCE)
            samples = chunk.take(pa.array(rows[here]))
            columns = {name: one_chunk(samples[name]) for name in samples.schema.names}
            columns |= {name: pa.array(of[here]) for name, of in added.items()}
            if self.files is None:
                for name, of in self.histories.items():
                    made = lists_of(columns, name, of, values[name])
                    columns |= {f"h_{column}": lists for column, lists in made.items()}
            yield pa.record_batch([columns[name] for name in self.schema.names], schema=self.schema)

    def _slices(
        self, chunk: pa.Table, moments: Moments, history: History
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rows of events, and begin and length [S] of each sample's slice of them.

        A history with a gap, as an event has not arrived, has a slice of its own after all others.
        """
        events = self._events(chunk, history.actions)
        begin, end, after = moments.known(events, duration(history.delay) or 0, None)
        most = min(history.length, len(chunk))
        first, length = np.maximum(begin, end - most), np.minimum(end - begin, most)
        parts, place = [events], len(events)
        for sample, later in after.items():
            places = np.concatenate([np.arange(first[sample], end[sample]), later])[-most:]
            parts.append(events[places])
            first[sample], length[sample] = place, len(places)
            place += len(places)
        return np.concatenate(parts), first, length

    def _count(self, chunk: pa.Table, moments: Moments, of: Count) -> np.ndarray:  # float64 [S]
        """Return a count or rate for each sample."""
        number = self._number(chunk, moments, of, of.actions)
        if of.per is None:
            return number
        base = self._number(chunk, moments, of, of.per)
        return number / np.maximum(base, 1) * (base > 0)

    def _number(
        self, chunk: pa.Table, moments: Moments, count: Count, actions: list[str] | None
    ) -> np.ndarray:  # float64 [S]
        """Return the number of events in the window of a count."""
        window = duration(count.delay) or 0, duration(count.within)
        begin, end, after = moments.known(self._events(chunk, actions), *window)
        number = (end - begin).astype(np.float64)
        for sample, later in after.items():
            number[sample] += len(later)
        return number

    def _events(self, chunk: pa.Table, actions: list[str] | None) -> np.ndarray:  # int64 [E]
        """Return the rows of events with one of some actions; None: any but impressions."""
        return np.flatnonzero(chunk[SETS].to_numpy() >> self.sets.index(actions) & 1)

    def _values(
        self, chunk: pa.Table, name: str, events: np.ndarray
    ) -> dict[str, pa.Array]:  # events int64 [E] -> [E] each
        """Return the values of a history and beside it, by column."""
        past = chunk.take(pa.array(events))
        columns = {name: one_chunk(past["iid"])}
        for beside, of in self.histories[name].parallel.items():
            if of.column == AGE:
                columns[beside] = one_chunk(past["ts"])
            else:
                columns[beside] = _beside(past, beside, of, self.lists[beside].value_type)
        return columns


def _beside(
    past: pa.Table, name: str, of: Parallel, kind: pa.DataType
) -> pa.Array:  # past [E] -> [E]
    """Return the values of a column beside a history."""
    values = one_chunk(past["action" if of.column == "action" else f"e_{of.column}"])
    if not pa.types.is_floating(kind):
        return values.fill_null(null_stand_in(kind)).cast(kind)
    numbers = values.fill_null(of.fill).to_numpy(zero_copy_only=False).astype(np.float32)
    if of.at_least is not None:
        return pa.array((numbers >= of.at_least).astype(np.float32))
    with np.errstate(over="ignore"):
        scaled = numbers / np.float32(of.scale)
    if not np.isfinite(scaled).all():
        raise ValueError(
            f"parallel: '{name}': a value divided by scale {of.scale} is no finite float32; set a "
            "larger scale"
        )
    return pa.array(scaled)
