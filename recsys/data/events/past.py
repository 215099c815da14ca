"""Runs the passes over sorted events that add histories and counts: one sort per set of keys."""

from __future__ import annotations

import pyarrow as pa

from recsys.data.events.engines.base import Engine
from recsys.data.events.histories import SETS, AddPast
from recsys.data.events.history_values import HistoryFiles, slice_columns
from recsys.data.events.rows import actions_in
from recsys.data.events.settings import Count, EventsConfig, History
from recsys.data.events.signals import quoted
from recsys.data.events.snapshots import with_columns

KEYS = {"user": "uid", "item": "iid"}


def add_past(
    engine: Engine, config: EventsConfig, types: dict[str, pa.DataType], files: HistoryFiles | None
) -> dict[str, pa.DataType]:
    """Make the stage `complete`: the stage `samples` with counts, and histories or their slices.

    `types` are those of the columns of `signals`. Values of histories go into `files`, and samples
    have slices of these; without files, they have lists.

    Returns:
        The types of the histories and the lists beside them, by name.
    """
    item_columns = _make_events(engine, config)
    schema = engine.table("SELECT * FROM samples LIMIT 0").schema
    types = {**types, **{name: schema.field(f"c_{name}").type for name in item_columns}}
    by_keys: dict[tuple[str, ...], dict[str, Count]] = {}
    for name, count in config.counts.items():
        by_keys.setdefault(tuple(count.of), {})[name] = count
    of_user = by_keys.pop(("user",), {})
    samples = "samples"
    for number, (of, counts) in enumerate(by_keys.items()):
        samples = _add_counts(engine, samples, number, list(of), counts)
    passed = engine.table(f"SELECT * FROM {samples} LIMIT 0").schema
    added = [(f"n_{name}", pa.float64()) for name in of_user]
    lists: dict[str, pa.DataType] = {}
    for name, history in config.histories.items():
        lists |= _list_types(name, history, types)
    if files is None:
        added += [(f"h_{name}", kind) for name, kind in lists.items()]
    else:
        added += slice_columns(config.histories).items()
    schema = pa.schema([*passed, *added])
    add = AddPast(["uid"], config.histories, of_user, lists, schema, files)
    _map(engine, "complete", samples, add, passed.names)
    return lists


def _make_events(engine: Engine, config: EventsConfig) -> list[str]:
    """Make the stage `past_events`: signals with the item columns that they need; return these."""
    listed = {part.column for of in config.histories.values() for part in of.parallel.values()}
    used = listed | {key for count in config.counts.values() for key in count.of}
    query, item_columns = "SELECT * FROM signals", list[str]()
    if config.items is not None:
        item_columns = [name for name in config.items.columns if name in used]
    if config.items is not None and item_columns:
        of_time = {name: f"e_{name}" for name in item_columns}
        query = with_columns(query, "item", "iid", of_time, config.items)
    names = [quoted(f"e_{name}") for name in item_columns]
    of_events = sorted(listed - {"age", "action", *item_columns})
    names += [f"{quoted(f'c_{name}')} AS {quoted(f'e_{name}')}" for name in of_events]
    make = engine.add if item_columns else engine.view
    columns = [
        "position, uid, iid, ts, action",
        *(["arrived"] if config.has_arrival else []),
        *names,
    ]
    make("past_events", f"SELECT {', '.join(columns)} FROM ({query})")
    return item_columns


def _add_counts(
    engine: Engine, samples: str, number: int, of: list[str], counts: dict[str, Count]
) -> str:
    """Make a stage of the samples with counts by some keys, and return its name."""
    keys = [KEYS.get(name, f"e_{name}") for name in of]
    schema = pa.schema(
        [("position", pa.int64()), *((f"n_{name}", pa.float64()) for name in counts)]
    )
    own = [KEYS.get(name) or f"{quoted(f'c_{name}')} AS {quoted(f'e_{name}')}" for name in of]
    known = " AND ".join(f"{quoted(key)} IS NOT NULL" for key in keys)
    names = ", ".join([*map(quoted, keys), "ts", "position"])
    own += ["ts", "position"]
    if "arrived" in engine.table("SELECT * FROM past_events LIMIT 0").schema.names:
        names += ", arrived"
        own.append("NULL AS arrived")
    add = AddPast(keys, {}, counts, {}, schema)
    sets, chosen = _sets_of(add)
    query = (
        f"SELECT * FROM (SELECT {', '.join(own)}, 0 AS {quoted(SETS)} "
        f"FROM {samples} UNION ALL SELECT {names}, {sets} FROM past_events "
        f"WHERE {chosen}) WHERE {known}"
    )
    engine.add_mapped(f"counts_{number}", query, keys, ["ts", "position"], add, schema)
    added = ", ".join(f"coalesce(c.{quoted(f'n_{n}')}, 0) AS {quoted(f'n_{n}')}" for n in counts)
    engine.add(
        f"counted_{number}",
        f"SELECT s.*, {added} FROM {samples} s LEFT JOIN counts_{number} c "
        "ON s.position = c.position",
    )
    return f"counted_{number}"


def _list_types(
    name: str, history: History, types: dict[str, pa.DataType]
) -> dict[str, pa.DataType]:
    lists = {name: pa.list_(types["iid"])}
    for parallel, of in history.parallel.items():
        kind = pa.float32()
        if of.column == "action":
            kind = pa.string()
        elif of.column != "age":
            own = types.get(f"c_{of.column}", types.get(of.column))
            assert own is not None
            kind = own if own in (pa.string(), pa.int64()) else kind
        lists[parallel] = pa.list_(kind)
    return lists


def _map(engine: Engine, stage: str, samples: str, add: AddPast, passed: list[str]) -> None:
    """Make a stage of the samples and events of each user."""
    shared = ["position", "uid", "iid", "ts"]
    events = engine.table("SELECT * FROM past_events LIMIT 0").schema.names
    own = [name for name in passed if name not in shared]
    past = [name for name in events if name not in shared]
    parallel = [part.column for of in add.histories.values() for part in of.parallel.values()]
    if "action" not in parallel:
        past.remove("action")
    sets, chosen = _sets_of(add)
    of_sample = ", ".join(
        [*shared, *map(quoted, own), *(f"NULL AS {quoted(name)}" for name in past)]
    )
    of_event = ", ".join(
        [*shared, *(f"NULL AS {quoted(name)}" for name in own), *map(quoted, past)]
    )
    query = (
        f"SELECT {of_sample}, 0 AS {quoted(SETS)} FROM {samples} UNION ALL "
        f"SELECT {of_event}, {sets} FROM past_events WHERE {chosen}"
    )
    engine.add_mapped(stage, query, ["uid"], ["ts", "iid", "position"], add, add.schema)


def _sets_of(add: AddPast) -> tuple[str, str]:
    """Return SQL of the column `SETS` of events, and the condition that it is not 0."""
    tests = [actions_in(actions) for actions in add.sets]
    if not tests:
        return "0", "1 = 0"
    bits = (f"CASE WHEN {test} THEN {1 << bit} ELSE 0 END" for bit, test in enumerate(tests))
    return " + ".join(bits), " OR ".join(f"({test})" for test in tests)
