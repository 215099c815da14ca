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
import pyarrow.compute as pc

from recsys.data.events.as_of import Moments, slices, whole_keys
from recsys.data.events.settings import Count, History, Parallel
from recsys.data.events.signals import IMPRESSION
from recsys.data.events.times import MICROS, duration

SAMPLES_AT_ONCE = 1 << 16  # samples whose histories are in memory at a time
DAY = 86_400 * MICROS["s"]


@dataclass(frozen=True)
class AddPast:
    """Maps sorted chunks of samples and events to the samples with histories and counts.

    keys: columns that events and samples share.
    histories, counts: what to add.
    schema: of the result; its first columns are those of samples.
    """

    keys: list[str]
    histories: dict[str, History]
    counts: dict[str, Count]
    schema: pa.Schema

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the samples of each chunk."""
        for chunk in whole_keys(batches, self.keys):
            yield from self._of_chunk(chunk)

    def _of_chunk(self, chunk: pa.Table) -> Iterator[pa.RecordBatch]:
        is_sample = chunk["is_sample"].to_numpy() == 1
        if not is_sample.any():
            return
        rows = np.flatnonzero(is_sample)
        moments = Moments(chunk, self.keys, is_sample)
        numbers = {f"n_{name}": self._count(chunk, moments, of) for name, of in self.counts.items()}
        ranges = {name: self._range(chunk, moments, of) for name, of in self.histories.items()}
        for first in range(0, len(rows), SAMPLES_AT_ONCE):
            here = slice(first, first + SAMPLES_AT_ONCE)
            columns = {name: pa.array(values[here]) for name, values in numbers.items()}
            for name, (events, begin, end) in ranges.items():
                columns |= self._lists(chunk, name, rows[here], events, begin[here], end[here])
            sample = chunk.take(pa.array(rows[here]))
            arrays = [
                columns[field.name] if field.name in columns else _one(sample[field.name])
                for field in self.schema
            ]
            yield pa.record_batch(arrays, schema=self.schema)

    def _count(self, chunk: pa.Table, moments: Moments, of: Count) -> np.ndarray:  # float64 [S]
        """Return a count or rate for each sample."""
        window = duration(of.delay) or 0, duration(of.within)
        begin, end = moments.window(events_with(chunk, of.actions), *window)
        if of.per is None:
            return (end - begin).astype(np.float64)
        base_begin, base_end = moments.window(events_with(chunk, of.per), *window)
        return (end - begin) / np.maximum(base_end - base_begin, 1) * (base_end > base_begin)

    def _range(
        self, chunk: pa.Table, moments: Moments, of: History
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the events of a history [E], and begin and end of each sample's among them."""
        events = events_with(chunk, of.actions)
        begin, end = moments.window(events, duration(of.delay) or 0, None)
        return events, np.maximum(begin, end - min(of.length, len(chunk))), end

    def _lists(
        self,
        chunk: pa.Table,
        name: str,
        rows: np.ndarray,  # int64 [S]
        events: np.ndarray,  # int64 [E]
        begin: np.ndarray,  # int64 [S]
        end: np.ndarray,  # int64 [S]
    ) -> dict[str, pa.Array]:
        """Return a history's lists, by column."""
        places, offsets = slices(begin, end)
        past, lists = events[places], pa.array(offsets, pa.int32())
        time = chunk["ts"].to_numpy()
        ago = np.repeat(time[rows], np.diff(offsets)) - time[past]
        columns = {f"h_{name}": _one(chunk["iid"].take(pa.array(past)))}
        for parallel, of in self.histories[name].parallel.items():
            columns[f"h_{parallel}"] = self._values(chunk, f"h_{parallel}", of, past, ago)
        return {name: pa.ListArray.from_arrays(lists, of) for name, of in columns.items()}

    def _values(
        self, chunk: pa.Table, name: str, of: Parallel, past: np.ndarray, ago: np.ndarray
    ) -> pa.Array:
        """Return the values beside a history, those of all samples one after another."""
        if of.column == "age":
            # A day is 0.15, a hundred days are 1: the order of magnitude of an age matters.
            return pa.array((np.log10(1 + ago / DAY) / 2).astype(np.float32))
        source = "action" if of.column == "action" else f"e_{of.column}"
        values = _one(chunk[source].take(pa.array(past)))
        kind = self.schema.field(name).type.value_type
        if not pa.types.is_floating(kind):  # ids that no vocabulary knows stand for null
            return values.fill_null("" if pa.types.is_string(kind) else -1).cast(kind)
        numbers = values.fill_null(of.fill).to_numpy(zero_copy_only=False).astype(np.float32)
        if of.at_least is not None:
            return pa.array((numbers >= of.at_least).astype(np.float32))
        with np.errstate(over="ignore"):
            scaled = numbers / np.float32(of.scale)
        if not np.isfinite(scaled).all():
            raise ValueError(
                f"parallel: '{name.removeprefix('h_')}': a value divided by scale {of.scale} is no "
                "finite float32; set a larger scale"
            )
        return pa.array(scaled)


def events_with(chunk: pa.Table, actions: list[str] | None) -> np.ndarray:  # int64 [E]
    """Return the rows of events with one of some actions; None: any but impressions."""
    wanted = pa.array([IMPRESSION] if actions is None else actions)
    chosen = np.asarray(pc.is_in(chunk["action"], wanted))
    chosen = ~chosen if actions is None else chosen
    return np.flatnonzero(chosen & (chunk["is_sample"].to_numpy() == 0))


def _one(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array."""
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
