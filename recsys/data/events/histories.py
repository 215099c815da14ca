"""Add histories and counts of earlier events to samples, with one sort for each set of keys.

Shapes: N rows of a chunk, E matching events of a chunk, S samples of a chunk.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from recsys.data.events.file_columns import Types
from recsys.data.events.history_values import (
    AGE,
    HistoryFiles,
    Moments,
    by_position,
    chunks_by_key,
    history_lists,
    null_stand_in,
    slice_columns,
    slice_names,
)
from recsys.data.events.samples import actions_in
from recsys.data.events.settings import Count, EventsConfig, Feature, History, Parallel
from recsys.data.events.snapshots import with_columns
from recsys.data.events.sql import FOREVER, SqlEngine, aligned, listed, quoted
from recsys.data.events.times import duration
from recsys.data.parquet.values import one_chunk

KEYS = {"user": "uid", "item": "iid"}
SETS = "/sets"
# Columns of past events that stand for several dropped ones: their number, and keys of the count.
NUMBER, EVENT_KEYS = "/n", "/keys"
SAMPLES_AT_ONCE = 1 << 16  # samples whose histories are in memory at a time


def add_histories(
    engine: SqlEngine, config: EventsConfig, types: Types, earlier: bool
) -> tuple[Types, HistoryFiles | None]:
    """Make the stage `complete`: samples with counts, and histories as lists, or slices of files.

    With `earlier`, a stage `earlier` has numbers `/n` of events that `clean_events` has dropped, by
    `action`, keys, and `/keys` of the count. Returns the types of lists, and files of slices.
    """
    item_columns = _make_past_events(engine, config, earlier)
    schema = engine.schema("samples")
    types = types | {name: schema.field(f"c_{name}").type for name in item_columns}
    counts_by_keys: dict[tuple[str, ...], dict[str, Count]] = {}
    for name, count in config.counts.items():
        counts_by_keys.setdefault(tuple(count.of), {})[name] = count
    user_counts = counts_by_keys.pop(("user",), {})
    samples = "samples"
    for number, (keys, counts) in enumerate(counts_by_keys.items()):
        samples = _add_counts(engine, samples, number, keys, counts)
    lists = _list_types(config, types)
    files = None if engine.scratch is None else HistoryFiles(engine.scratch, config.histories)
    added_columns = {f"n_{name}": pa.float64() for name in user_counts}
    if files is None:
        added_columns |= {f"h_{name}": kind for name, kind in lists.items()}
    else:
        added_columns |= slice_columns(config.histories)
    sample_schema = engine.schema(samples)
    schema = pa.schema([*sample_schema, *added_columns.items()])
    features = HistoryFeatures(["uid"], config.histories, user_counts, lists, schema, files)
    events = "past_events"
    if earlier:
        _add_recent_events(engine, config, samples, list(user_counts.values()))
        events = "recent_events"
    sample_columns = {name: quoted(name) for name in sample_schema.names}
    event_columns = {name: quoted(name) for name in engine.schema(events).names}
    if "action" not in (parallel.column for parallel in config.parallels.values()):
        del event_columns["action"]
    query = features.query(samples, sample_columns, events, event_columns)
    engine.add_mapped("complete", query, ["uid"], ["ts", "iid"], features)
    return lists, files


def _make_past_events(engine: SqlEngine, config: EventsConfig, earlier: bool) -> dict[str, Feature]:
    """Make the stage `past_events`: clean events with item features; return these features."""
    listed_columns = {parallel.column for parallel in config.parallels.values()}
    read = listed_columns.union(*(count.of for count in config.counts.values()))
    features = {name: feature for name, feature in config.item_features.items() if name in read}
    query = "SELECT * FROM clean_events"
    if features:
        query = with_columns(query, "item", "iid", features, "e_")
    event_columns = sorted(listed_columns - {AGE, "action", *features})
    columns = {name: name for name in ("position", "uid", "iid", "ts", "action")}
    if config.has_arrival:
        columns["arrived"] = "arrived"
    columns |= {f"e_{name}": quoted(f"e_{name}") for name in features}
    columns |= {f"e_{name}": quoted(f"c_{name}") for name in event_columns}
    if earlier:
        columns |= {NUMBER: "CAST(1 AS BIGINT)", EVENT_KEYS: "''"}
    query = f"SELECT {aligned(columns, columns)} FROM ({query})"
    if earlier:
        numbers = {name: quoted(name) for name in engine.schema("earlier").names}
        numbers |= {"ts": f"{-FOREVER}", "arrived": f"{-FOREVER}"}
        query += f" UNION ALL SELECT {aligned(columns, numbers)} FROM earlier"
    make = engine.add if features else engine.view
    make("past_events", query)
    return features


def number_earlier(engine: SqlEngine, config: EventsConfig, dropped: str) -> str:
    """Return SQL of `earlier` plus the events of `past_events` that the condition drops."""
    unbounded = {
        tuple(dict.fromkeys(map(event_key, count.of))): None
        for count in config.counts.values()
        if duration(count.within) is None
    }
    names = [name for name in engine.schema("earlier").names if name != NUMBER]
    queries = [f"SELECT {listed([*names, NUMBER])} FROM earlier"]
    for keys in unbounded:
        columns = {name: quoted(name) for name in ("action", *keys, NUMBER)}
        columns[EVENT_KEYS] = f"'{','.join(keys)}'"
        queries.append(
            f"SELECT {aligned([*names, NUMBER], columns)} FROM past_events "
            f"WHERE {quoted(EVENT_KEYS)} = '' AND {dropped}"
        )
    return (
        f"SELECT {listed(names)}, CAST(sum({quoted(NUMBER)}) AS BIGINT) AS {quoted(NUMBER)} "
        f"FROM ({' UNION ALL '.join(queries)}) GROUP BY {listed(names)}"
    )


def _list_types(config: EventsConfig, types: Types) -> Types:
    lists = {}
    for name, history in config.histories.items():
        lists[name] = pa.list_(types["iid"])
        for parallel_name, parallel in history.parallel.items():
            column_type = types.get(f"c_{parallel.column}", types.get(parallel.column))
            is_id = parallel.column != AGE and column_type in (pa.string(), pa.int64())
            lists[parallel_name] = pa.list_(column_type if is_id else pa.float32())
    return lists


def _add_counts(
    engine: SqlEngine, samples: str, number: int, names: Iterable[str], counts: dict[str, Count]
) -> str:
    """Make a stage of the samples with counts by some keys, and return its name."""
    keys = {event_key(name): KEYS.get(name) or quoted(f"c_{name}") for name in names}
    make_counts(engine, f"counts_{number}", samples, keys, counts, ["position"])
    columns = {f"n_{name}": f"coalesce(c.{quoted(f'n_{name}')}, 0)" for name in counts}
    engine.add(
        f"counted_{number}",
        f"SELECT s.*, {aligned(columns, columns)} FROM {samples} s LEFT JOIN counts_{number} c "
        "ON s.position = c.position",
    )
    return f"counted_{number}"


def event_key(name: str) -> str:
    """Return the column of `past_events` for a name in a count's `of`."""
    return KEYS.get(name, f"e_{name}")


def make_counts(
    engine: SqlEngine,
    stage: str,
    samples: str,
    keys: dict[str, str],
    counts: dict[str, Count],
    output: list[str],
) -> None:
    """Make a stage of samples with counts `n_NAME` and columns `output`: keys, or `position`.

    `keys` maps the columns of `past_events` to group by to SQL of the same value in `samples`.
    """
    past_schema = engine.schema("past_events")
    added_columns = [(f"n_{name}", pa.float64()) for name in counts]
    schema = pa.schema([*(past_schema.field(name) for name in output), *added_columns])
    features = HistoryFeatures(list(keys), {}, counts, {}, schema)
    sample_columns = keys | {"ts": "ts", "position": "position"}
    read = [name for name in (*sample_columns, "arrived", NUMBER) if name in past_schema.names]
    event_columns = {name: quoted(name) for name in read}
    events = "past_events"
    if NUMBER in past_schema.names:
        events = f"(SELECT * FROM past_events WHERE {_has_keys(features.keys, samples, keys)})"
    query = features.query(samples, sample_columns, events, event_columns)
    has_keys = " AND ".join(f"{quoted(key)} IS NOT NULL" for key in keys)
    query = f"SELECT * FROM ({query}) WHERE {has_keys}"
    engine.add_mapped(stage, query, features.keys, ["ts"], features)


def _has_keys(keys: list[str], samples: str, columns: dict[str, str]) -> str:
    """Return the SQL condition of events, and of numbers of events, whose keys a sample has."""
    return (
        f"{quoted(EVENT_KEYS)} IN ('', '{','.join(keys)}') AND ({listed(keys)}) IN "
        f"(SELECT DISTINCT {', '.join(columns[key] for key in keys)} FROM {samples})"
    )


def _add_recent_events(
    engine: SqlEngine, config: EventsConfig, samples: str, counts: list[Count]
) -> None:
    """Make the stage `recent_events`, which histories and counts of the samples' users may use.

    All samples of a user know events that had arrived a delay before the first sample. Of these,
    only the last ones matter, unless counts are over all time.
    """
    names = [name for name in engine.schema("past_events").names if name != EVENT_KEYS]
    if any(duration(count.within) is None for count in counts):
        has_user = _has_keys(["uid"], samples, {"uid": "uid"})
        engine.view("recent_events", f"SELECT {listed(names)} FROM past_events WHERE {has_user}")
        return
    names.remove(NUMBER)  # it is 1 for each event
    delays = [h.delay for h in config.histories.values()] + [count.delay for count in counts]
    delay = max((duration(text) or 0 for text in delays), default=0)
    longest = max((duration(count.within) or 0 for count in counts), default=-FOREVER)
    first_times = [f"any_value(settled) - ({longest})"] + [
        f"coalesce({engine.first_of_last(history.length, test)}, {FOREVER})"
        for history in config.histories.values()
        for test in [f"arrived <= settled AND ({actions_in(history.actions)})"]
    ]
    engine.add(
        "recent",
        f"SELECT uid, any_value(settled) AS settled, least({', '.join(first_times)}) AS since "
        f"FROM past_events JOIN (SELECT uid, min(ts) - {delay + 1} AS settled FROM {samples} "
        f"GROUP BY uid) USING (uid) WHERE {quoted(EVENT_KEYS)} = '' GROUP BY uid",
    )
    engine.view(
        "recent_events",
        f"SELECT {', '.join(f'e.{quoted(name)}' for name in names)} FROM past_events e "
        f"JOIN recent r ON e.uid = r.uid WHERE {quoted(EVENT_KEYS)} = '' "
        "AND (e.arrived > r.settled OR e.ts >= r.since)",
    )


@dataclass(frozen=True)
class HistoryFeatures:
    """A function from sorted chunks of samples and events to samples with histories and counts."""

    keys: list[str]  # columns that events and samples share
    histories: dict[str, History]
    counts: dict[str, Count]
    lists: Types
    schema: pa.Schema  # of the result, samples' columns first
    files: HistoryFiles | None = None  # get the values of slices; None: samples have lists

    @property
    def action_sets(self) -> list[list[str] | None]:
        """Return the sets of actions of histories and counts, each once."""
        sets = [history.actions for history in self.histories.values()]
        sets += [count.actions for count in self.counts.values()]
        sets += [count.per for count in self.counts.values() if count.per is not None]
        return [actions for index, actions in enumerate(sets) if actions not in sets[:index]]

    def query(
        self, samples: str, columns: dict[str, str], events: str, event_columns: dict[str, str]
    ) -> str:
        """Return SQL of `samples` and of those `events` that histories or counts use."""
        names = columns | event_columns
        tests = [actions_in(actions) for actions in self.action_sets]
        bits = (f"CASE WHEN {test} THEN {1 << bit} ELSE 0 END" for bit, test in enumerate(tests))
        is_used = " OR ".join(f"({test})" for test in tests)
        return (
            f"SELECT {aligned(names, columns)}, 0 AS {quoted(SETS)} FROM {samples} UNION ALL "
            f"SELECT {aligned(names, event_columns)}, {' + '.join(bits) or '0'} FROM {events} "
            f"WHERE ({is_used or '1 = 0'})"
        )

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for chunk in chunks_by_key(batches, self.keys):
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
            slices = begin + first_value, length.astype(np.int32)
            columns_of_samples |= zip(slice_names(name), slices)
        for first in range(0, len(rows), SAMPLES_AT_ONCE):
            block = slice(first, first + SAMPLES_AT_ONCE)
            samples = chunk.take(pa.array(rows[block]))
            columns = {name: one_chunk(samples[name]) for name in samples.schema.names}
            columns |= {
                name: pa.array(column[block]) for name, column in columns_of_samples.items()
            }
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
        if NUMBER in chunk.column_names:  # only events, not numbers of dropped events
            events = events[np.asarray(chunk["position"].is_valid())[events]]
        events = by_position(chunk, events)
        begin, end, late = moments.known(events, duration(history.delay) or 0, None)
        longest = min(history.length, len(chunk))
        first, length = np.maximum(begin, end - longest), np.minimum(end - begin, longest)
        slices, total = [events], len(events)
        for sample, late_events in late.items():
            indices = np.concatenate([np.arange(first[sample], end[sample]), late_events])
            indices = indices[-longest:]
            slices.append(events[indices])
            first[sample], length[sample] = total, len(indices)
            total += len(indices)
        return np.concatenate(slices), first, length

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
        """Return the values [E] of a history and its parallel lists at rows [E], by column."""
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
