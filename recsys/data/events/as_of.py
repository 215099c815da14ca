"""Finds what was known at a sample's moment: positions of cuts among sorted events.

Per key, the events before a moment are a prefix, which one binary search locates. An event that
arrives late is used from its arrival on.

Shapes: N rows of a chunk, E events of them that match, S samples of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def whole_keys(batches: Iterable[pa.RecordBatch], keys: Sequence[str]) -> Iterator[pa.Table]:
    """Yield chunks of sorted batches that cut no key in two."""
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
        starts[1:] |= np.asarray(changes)
    return starts


def key_numbers(chunk: pa.Table, keys: Sequence[str]) -> np.ndarray:  # chunk [N] -> int64 [N]
    """Return the number of each row's key: 0, 1, 2 ... in their order."""
    return np.cumsum(_starts(chunk, keys)) - 1


class Moments:
    """Samples and events of whole keys, sorted by key and `ts`; keys have no nulls."""

    def __init__(
        self, chunk: pa.Table, keys: Sequence[str], samples: np.ndarray
    ) -> None:  # chunk [N], samples bool [N]: which rows are samples
        self._key = key_numbers(chunk, keys)  # [N]
        time = chunk["ts"].to_numpy()
        ordered = np.sort(time)  # numpy.unique takes a hash table first, several times as long
        self._times = ordered[np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))]
        self._place = self._key * (len(self._times) + 1) + np.searchsorted(self._times, time)
        self._time, self._sample_key = time[samples], self._key[samples]  # [S]
        arrived = chunk["arrived"] if "arrived" in chunk.column_names else None
        self._arrived = None if arrived is None else arrived.fill_null(0).to_numpy()  # [N]
        self._event_time = time

    def _events_before(
        self, events: np.ndarray, delay: int
    ) -> np.ndarray:  # events int64 [E], rows, ascending -> int64 [S]
        """Return the number of events, of this and earlier keys, before each sample's `delay`."""
        rank = np.searchsorted(self._times, self._time - delay)
        place = self._sample_key * (len(self._times) + 1) + rank
        return np.searchsorted(self._place[events], place)

    def known(
        self, events: np.ndarray, delay: int, within: int | None
    ) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
        """Return the events in each sample's window that had arrived by its time.

        The window ends `delay` microseconds before it and is `within` long (None: unbounded).
        `events` int64 [E] are rows, ascending.

        Returns:
            Begin and end of the events known without a gap, int64 [S] each. For samples with events
            after a gap, their places in `events`.
        """
        end = self._events_before(events, delay)
        if within is None:  # all of its key: it begins after the events of earlier keys
            begin = np.searchsorted(self._key[events], self._sample_key)
        else:
            begin = self._events_before(events, delay + within)
        if self._arrived is None:
            return begin, end, {}
        since = np.maximum(self._arrived[events], self._event_time[events] + delay + 1)  # [E]
        moments = np.unique(since)
        place = self._key[events] * (len(moments) + 1) + np.searchsorted(moments, since)
        rank = np.searchsorted(moments, self._time, side="right")
        cut = self._sample_key * (len(moments) + 1) + rank  # [S]
        gap = np.searchsorted(np.maximum.accumulate(place), cut)  # first event that is not known
        num_known = np.searchsorted(np.sort(place), cut)
        after: dict[int, np.ndarray] = {}
        for sample in np.flatnonzero(num_known > gap).tolist():
            later = np.arange(max(begin[sample], gap[sample]), end[sample])
            later = later[since[later] <= self._time[sample]]
            if len(later):
                after[sample] = later
        return np.minimum(begin, gap), gap, after
