"""Adds histories and counts of earlier events to samples: one sort for each set of keys.

Shapes: N rows of a chunk, E events of them that match, S samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from recsys.data.events.history_values import (
    AGE,
    HistoryFiles,
    Moments,
    begin_column,
    by_position,
    history_lists,
    length_column,
    null_stand_in,
    slice_columns,
    whole_keys,
)
from recsys.data.events.samples import actions_in
from recsys.data.events.settings import Count, EventsConfig, History, Parallel
from recsys.data.events.snapshots import with_columns
from recsys.data.events.sql import FOREVER, SqlEngine, quoted
from recsys.data.events.times import duration
from recsys.data.parquet.values import one_chunk

KEYS = {"user": "uid", "item": "iid"}
SETS = "/sets"
# Columns of past events where some are numbers of events: the number, and the keys of their count.
NUMBER, EVENT_KEYS = "/n", "/keys"
SAMPLES_AT_ONCE = 1 << 16  # samples whose histories are in memory at a time


def add_histories(
    engine: SqlEngine,
    config: EventsConfig,
    types: dict[str, pa.DataType],
    files: HistoryFiles | None,
    earlier: str | None = None,
) -> dict[str, pa.DataType]:
    """Make the stage `complete`: samples with counts and histories, slices of `files` or lists.

    `earlier` is a stage of numbers of events that are no rows of `clean_events` any more: by keys
    and `action`, `/keys` of the count, and `/n`.
    """
    item_columns = _make_past_events(engine, config, earlier)
    schema = _schema(engine, "samples")
    types = {**types, **{name: schema.field(f"c_{name}").type for name in item_columns}}
    counts_by_keys: dict[tuple[str, ...], dict[str, Count]] = {}
    for name, count in config.counts.items():
        counts_by_keys.setdefault(tuple(count.of), {})[name] = count
    user_counts = counts_by_keys.pop(("user",), {})
    samples = "samples"
    for number, (keys, counts) in enumerate(counts_by_keys.items()):
        samples = _add_counts(engine, samples, number, list(keys), counts)
    schema = _schema(engine, samples)
    added_columns = [(f"n_{name}", pa.float64()) for name in user_counts]
    lists = {
        list_name: kind
        for name, history in config.histories.items()
        for list_name, kind in _list_types(name, history, types).items()
    }
    if files is None:
        added_columns += [(f"h_{name}", kind) for name, kind in lists.items()]
    else:
        added_columns += slice_columns(config.histories).items()
    features = HistoryFeatures(
        ["uid"], config.histories, user_counts, lists, pa.schema([*schema, *added_columns]), files
    )
    event_columns = [name for name in _schema(engine, "past_events").names if name != EVENT_KEYS]
    if "action" not in (parallel.column for parallel in config.parallels.values()):
        event_columns.remove("action")
    events, has_keys = "past_events", "1 = 1"
    if earlier is not None:
        events, has_keys = _recent_events(engine, config, samples, list(user_counts.values()))
    if events != "past_events":  # single ones, no numbers of them
        event_columns = [name for name in event_columns if name != NUMBER]
    query = _samples_and_events(
        features,
        samples,
        {name: quoted(name) for name in schema.names},
        {name: quoted(name) for name in event_columns},
        has_keys,
        events,
    )
    engine.add_mapped("complete", query, ["uid"], ["ts", "iid"], features, features.schema)
    return lists


def _schema(engine: SqlEngine, stage: str) -> pa.Schema:
    return engine.table(f"SELECT * FROM {stage} LIMIT 0").schema


def _make_past_events(engine: SqlEngine, config: EventsConfig, earlier: str | None) -> list[str]:
    """Make the stage `past_events`: clean events with the item columns they need; return these."""
    listed = {parallel.column for parallel in config.parallels.values()}
    read = listed | {key for count in config.counts.values() for key in count.of}
    query, item_columns = "SELECT * FROM clean_events", list[str]()
    if config.items is not None:
        item_columns = [name for name in config.items.columns if name in read]
        if item_columns:
            columns = {name: f"e_{name}" for name in item_columns}
            query = with_columns(query, "item", "iid", columns, config.items)
    make = engine.add if item_columns else engine.view
    own_columns = sorted(listed - {"age", "action", *item_columns})
    names = [
        "position, uid, iid, ts, action",
        *(["arrived"] if config.has_arrival else []),
        *(quoted(f"e_{name}") for name in item_columns),
        *(f"{quoted(f'c_{name}')} AS {quoted(f'e_{name}')}" for name in own_columns),
    ]
    query = f"SELECT {', '.join(names)} FROM ({query})"
    if earlier is not None:
        names = ["position", "uid", "iid", "ts", "action", "arrived"]
        names += [f"e_{name}" for name in (*item_columns, *own_columns)]
        numbers = {name: quoted(name) for name in _schema(engine, earlier).names}
        numbers |= {"ts": f"{-FOREVER}", "arrived": f"{-FOREVER}"}
        query = (
            f"SELECT {', '.join(map(quoted, names))}, CAST(1 AS BIGINT) AS {quoted(NUMBER)}, '' AS "
            f"{quoted(EVENT_KEYS)} FROM ({query}) UNION ALL SELECT "
            f"{_aligned([*names, NUMBER, EVENT_KEYS], numbers)} FROM {earlier}"
        )
    make("past_events", query)
    return item_columns


def number_earlier(engine: SqlEngine, config: EventsConfig, dropped: str, earlier: str) -> str:
    """Return SQL of `earlier` with the events of `past_events` that a condition drops."""
    unbounded = {
        tuple(dict.fromkeys(map(event_key, count.of))): None
        for count in config.counts.values()
        if duration(count.within) is None
    }
    names = [name for name in _schema(engine, earlier).names if name != NUMBER]
    columns = ", ".join(map(quoted, names))
    parts = [f"SELECT {columns}, {quoted(NUMBER)} FROM {earlier}"]
    for keys in unbounded:
        present = {name: quoted(name) for name in ("action", *keys, NUMBER)}
        present[EVENT_KEYS] = f"'{','.join(keys)}'"
        parts.append(
            f"SELECT {_aligned([*names, NUMBER], present)} FROM past_events "
            f"WHERE {quoted(EVENT_KEYS)} = '' AND {dropped}"
        )
    rows = " UNION ALL ".join(parts)
    return (
        f"SELECT {columns}, CAST(sum({quoted(NUMBER)}) AS BIGINT) AS {quoted(NUMBER)} "
        f"FROM ({rows}) GROUP BY {columns}"
    )


def _aligned(names: list[str], columns: dict[str, str]) -> str:
    """Return SQL of columns in the order of names, null where there is none."""
    return ", ".join(f"{columns.get(name, 'NULL')} AS {quoted(name)}" for name in names)


def _list_types(
    name: str, history: History, types: dict[str, pa.DataType]
) -> dict[str, pa.DataType]:
    lists = {name: pa.list_(types["iid"])}
    for parallel_name, parallel in history.parallel.items():
        column_type = types.get(f"c_{parallel.column}", types.get(parallel.column))
        is_id = parallel.column != AGE and column_type in (pa.string(), pa.int64())
        lists[parallel_name] = pa.list_(column_type if is_id else pa.float32())
    return lists


def _add_counts(
    engine: SqlEngine, samples: str, number: int, names: list[str], counts: dict[str, Count]
) -> str:
    """Make a stage of the samples with counts by some keys, and return its name."""
    keys = {event_key(name): KEYS.get(name) or quoted(f"c_{name}") for name in names}
    make_counts(engine, f"counts_{number}", samples, keys, counts, ["position"])
    count_columns = ", ".join(
        f"coalesce(c.{quoted(f'n_{name}')}, 0) AS {quoted(f'n_{name}')}" for name in counts
    )
    engine.add(
        f"counted_{number}",
        f"SELECT s.*, {count_columns} FROM {samples} s LEFT JOIN counts_{number} c "
        "ON s.position = c.position",
    )
    return f"counted_{number}"


def event_key(name: str) -> str:
    """Return the column of `past_events` by which a name in `of` of a count counts."""
    return KEYS.get(name, f"e_{name}")


def make_counts(
    engine: SqlEngine,
    stage: str,
    samples: str,
    keys: dict[str, str],
    counts: dict[str, Count],
    output: list[str],
) -> None:
    """Make a stage of counts `n_NAME` beside columns `output`, keys or `position`, of samples.

    `keys` has the samples' SQL of each column of `past_events` by which is counted.
    """
    past = _schema(engine, "past_events")
    added_columns = [(f"n_{name}", pa.float64()) for name in counts]
    schema = pa.schema([*(past.field(name) for name in output), *added_columns])
    features = HistoryFeatures(list(keys), {}, counts, {}, schema)
    columns = {"ts": "ts", "position": "position"}
    event_columns = {key: quoted(key) for key in keys} | columns
    event_columns |= {name: quoted(name) for name in ("arrived", NUMBER) if name in past.names}
    condition = "1 = 1"
    if NUMBER in past.names:
        condition = _has_keys(features.keys, samples, keys)
    query = _samples_and_events(features, samples, keys | columns, event_columns, condition)
    has_keys = " AND ".join(f"{quoted(key)} IS NOT NULL" for key in keys)
    query = f"SELECT * FROM ({query}) WHERE {has_keys}"
    engine.add_mapped(stage, query, list(keys), ["ts"], features, features.schema)


def _has_keys(keys: list[str], samples: str, columns: dict[str, str]) -> str:
    """Return the SQL condition of events, and numbers of them, with the keys of some sample."""
    sample_keys = ", ".join(columns[key] for key in keys)
    return (
        f"{quoted(EVENT_KEYS)} IN ('', '{','.join(keys)}') AND ({', '.join(map(quoted, keys))}) IN "
        f"(SELECT DISTINCT {sample_keys} FROM {samples})"
    )


def _recent_events(
    engine: SqlEngine, config: EventsConfig, samples: str, counts: list[Count]
) -> tuple[str, str]:
    """Make a stage of the events that histories and counts of the samples' users may use.

    All samples of a user know the events that had arrived a delay before the first of them, so only
    the last ones of these matter. Returns the stage, and the condition of its rows.
    """
    if any(duration(count.within) is None for count in counts):
        return "past_events", _has_keys(["uid"], samples, {"uid": "uid"})
    delays = [part.delay for part in config.histories.values()] + [part.delay for part in counts]
    delay = max((duration(text) or 0 for text in delays), default=0)
    longest = max((duration(count.within) or 0 for count in counts), default=-FOREVER)
    since = [f"any_value(settled) - ({longest})"] + [
        f"coalesce({engine.least_of_last('ts', history.length, test)}, {FOREVER})"
        for history in config.histories.values()
        for test in [f"arrived <= settled AND ({actions_in(history.actions)})"]
    ]
    engine.add(
        "recent",
        f"SELECT uid, any_value(settled) AS settled, least({', '.join(since)}) AS since "
        f"FROM past_events JOIN (SELECT uid, min(ts) - {delay + 1} AS settled FROM {samples} "
        f"GROUP BY uid) USING (uid) WHERE {quoted(EVENT_KEYS)} = '' GROUP BY uid",
    )
    engine.view(
        "recent_events",
        "SELECT e.* FROM past_events e JOIN recent r ON e.uid = r.uid "
        f"WHERE {quoted(EVENT_KEYS)} = '' AND (e.arrived > r.settled OR e.ts >= r.since)",
    )
    return "recent_events", "1 = 1"


def _samples_and_events(
    features: HistoryFeatures,
    samples: str,
    sample_columns: dict[str, str],
    event_columns: dict[str, str],
    has_keys: str,
    events: str = "past_events",
) -> str:
    """Return SQL of a stage of samples and the past events that features use."""
    names = dict.fromkeys([*sample_columns, *event_columns])
    sample, event = (
        ", ".join(f"{columns.get(name, 'NULL')} AS {quoted(name)}" for name in names)
        for columns in (sample_columns, event_columns)
    )
    tests = [actions_in(actions) for actions in features.action_sets]
    bits = (f"CASE WHEN {test} THEN {1 << bit} ELSE 0 END" for bit, test in enumerate(tests))
    is_used = " OR ".join(f"({test})" for test in tests)
    return (
        f"SELECT {sample}, 0 AS {quoted(SETS)} FROM {samples} UNION ALL SELECT {event}, "
        f"{' + '.join(bits) or '0'} FROM {events} WHERE ({is_used or '1 = 0'}) AND {has_keys}"
    )


@dataclass(frozen=True)
class HistoryFeatures:
    """Maps sorted chunks of samples and events to the samples with histories and counts.

    keys: columns that events and samples share. schema: of the result, samples' columns first.
    files: for the values of histories, of which samples then have slices; None: they have lists.
    """

    keys: list[str]
    histories: dict[str, History]
    counts: dict[str, Count]
    lists: dict[str, pa.DataType]
    schema: pa.Schema
    files: HistoryFiles | None = None

    @property
    def action_sets(self) -> list[list[str] | None]:
        """Return the sets of actions of histories and counts, each once."""
        sets = [history.actions for history in self.histories.values()]
        sets += [count.actions for count in self.counts.values()]
        sets += [count.per for count in self.counts.values() if count.per is not None]
        return [actions for place, actions in enumerate(sets) if actions not in sets[:place]]

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for chunk in whole_keys(batches, self.keys):
            is_sample = chunk[SETS].to_numpy() == 0
            if is_sample.any():
                yield from self._samples(chunk, is_sample)

    def _samples(self, chunk: pa.Table, is_sample: np.ndarray) -> Iterator[pa.RecordBatch]:
        rows = np.flatnonzero(is_sample)
        moments = Moments(chunk, self.keys, is_sample)
        columns_of_samples = {
            f"n_{name}": self._count(chunk, moments, count) for name, count in self.counts.items()
        }
        values: dict[str, dict[str, pa.Array]] = {}
        for name, history in self.histories.items():
            events, begin, length = self._slices(chunk, moments, history)
            values[name] = self._values(chunk, name, events)
            first_value = 0 if self.files is None else self.files.append(name, values[name])
            columns_of_samples[begin_column(name)] = begin + first_value
            columns_of_samples[length_column(name)] = length.astype(np.int32)
        for first in range(0, len(rows), SAMPLES_AT_ONCE):
            part = slice(first, first + SAMPLES_AT_ONCE)
            samples = chunk.take(pa.array(rows[part]))
            columns = {name: one_chunk(samples[name]) for name in samples.schema.names}
            columns |= {name: pa.array(column[part]) for name, column in columns_of_samples.items()}
            if self.files is None:
                for name, history in self.histories.items():
                    lists = history_lists(columns, name, history, values[name])
                    columns |= {f"h_{list_name}": column for list_name, column in lists.items()}
            yield pa.record_batch([columns[name] for name in self.schema.names], schema=self.schema)

    def _slices(
        self, chunk: pa.Table, moments: Moments, history: History
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rows of events, and begin and length [S] of each sample's slice of them."""
        events = self._events(chunk, history.actions)
        if NUMBER in chunk.column_names:  # events alone, no numbers of them
            events = events[np.asarray(chunk["position"].is_valid())[events]]
        events = by_position(chunk, events)
        begin, end, late = moments.known(events, duration(history.delay) or 0, None)
        longest = min(history.length, len(chunk))
        first, length = np.maximum(begin, end - longest), np.minimum(end - begin, longest)
        parts, place = [events], len(events)
        for sample, late_events in late.items():
            places = np.concatenate([np.arange(first[sample], end[sample]), late_events])
            places = places[-longest:]
            parts.append(events[places])
            first[sample], length[sample] = place, len(places)
            place += len(places)
        return np.concatenate(parts), first, length

    def _count(self, chunk: pa.Table, moments: Moments, count: Count) -> np.ndarray:  # float64 [S]
        number = self._number(chunk, moments, count, count.actions)
        if count.per is None:
            return number
        base = self._number(chunk, moments, count, count.per)
        return number / np.maximum(base, 1) * (base > 0)

    def _number(
        self, chunk: pa.Table, moments: Moments, count: Count, actions: list[str] | None
    ) -> np.ndarray:  # float64 [S]
        window = duration(count.delay) or 0, duration(count.within)
        events = self._events(chunk, actions)
        begin, end, late = moments.known(events, *window)
        number = (end - begin).astype(np.float64)
        if NUMBER in chunk.column_names:
            total = np.concatenate([[0], np.cumsum(chunk[NUMBER].to_numpy()[events])])
            number = (total[end] - total[begin]).astype(np.float64)
        for sample, late_events in late.items():
            number[sample] += len(late_events)
        return number

    def _events(self, chunk: pa.Table, actions: list[str] | None) -> np.ndarray:  # int64 [E]
        return np.flatnonzero(chunk[SETS].to_numpy() >> self.action_sets.index(actions) & 1)

    def _values(self, chunk: pa.Table, name: str, rows: np.ndarray) -> dict[str, pa.Array]:
        """Return the values [E] of a history and beside it, by column, at rows [E]."""
        events = chunk.take(pa.array(rows))
        columns = {name: one_chunk(events["iid"])}
        for list_name, parallel in self.histories[name].parallel.items():
            if parallel.column == AGE:
                columns[list_name] = one_chunk(events["ts"])
            else:
                kind = self.lists[list_name].value_type
                columns[list_name] = _parallel_values(events, list_name, parallel, kind)
        return columns


def _parallel_values(
    events: pa.Table, name: str, parallel: Parallel, kind: pa.DataType
) -> pa.Array:  # events [E] -> [E]
    column = "action" if parallel.column == "action" else f"e_{parallel.column}"
    values = one_chunk(events[column])
    if not pa.types.is_floating(kind):
        return values.fill_null(null_stand_in(kind)).cast(kind)
    numbers = values.fill_null(parallel.fill).to_numpy(zero_copy_only=False).astype(np.float32)
    if parallel.at_least is not None:
        return pa.array((numbers >= parallel.at_least).astype(np.float32))
    with np.errstate(over="ignore"):
        scaled = numbers / np.float32(parallel.scale)
    if not np.isfinite(scaled).all():
        raise ValueError(
            f"parallel: '{name}': a value divided by scale {parallel.scale} is no finite float32; "
            "set a larger scale"
        )
    return pa.array(scaled)
