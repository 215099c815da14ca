"""Reads events and impressions as one stage, `clean_events`, and leaves out what cannot be used."""

from __future__ import annotations

import time

import pyarrow as pa

from recsys.data.events.file_columns import LARGEST, Field
from recsys.data.events.reader import FILE_BITS, Reader, open_source
from recsys.data.events.settings import EventsConfig, EventTable, Feature, Source
from recsys.data.events.sql import FOREVER, SqlEngine, count_by_reason, count_rows, quoted
from recsys.data.events.times import DURATIONS, MICROS, latest_moment

YEAR = 365 * DURATIONS["d"] * MICROS["s"]
PLAUSIBLE = 20 * YEAR  # a log that begins later may be one of this time
IMPRESSION = "impression"  # the action of impressions
KINDS = {"id": "id", "ids": "ids", "dense": "number"}  # of features, as fields


def settle_fill(name: str, feature: Feature, kind: pa.DataType) -> None:
    """Give a feature's `fill` the type of its column, in place; another value is a ValueError."""
    fill = feature.fill
    if fill is None:
        return
    if isinstance(fill, str) and {"'", "\\"} & set(fill):
        raise ValueError(f"'{name}': fill {fill!r} has a quote or a backslash; write another text")
    if kind == pa.string() and isinstance(fill, int):  # YAML reads 7 as an integer
        fill = feature.fill = str(fill)
    types = {pa.string(): str, pa.int64(): int, pa.float64(): (int, float)}.get(kind, ())
    if not isinstance(fill, types) or (feature.kind == "dense" and not abs(fill) <= LARGEST):  # type: ignore[arg-type]
        raise ValueError(f"'{name}': fill is {fill!r}, but the column has type {kind}; correct it")


def event_columns(config: EventsConfig) -> dict[str, str]:
    """Return the columns of events that something uses, with the kinds of their fields."""
    items = config.items.columns if config.items else {}
    names = [label.column for label in config.labels.values() if label.column is not None]
    names += [parallel.column for parallel in config.parallels.values()] + config.late
    if config.weight is not None and config.weight.column is not None:
        names.append(config.weight.column)
    kinds = {name: KINDS[feature.kind] for name, feature in config.context.items()}
    for name in names:
        if name not in ("age", "action") and name not in items:
            kinds.setdefault(name, "number")
    return kinds


def tables_of(config: EventsConfig) -> dict[str, EventTable]:
    """Return the tables of events and impressions, by action."""
    impressions = {} if config.impressions is None else {IMPRESSION: config.impressions}
    return {**config.events, **impressions}


def read_events(
    engine: SqlEngine, config: EventsConfig
) -> tuple[dict[str, pa.DataType], int, dict[str, int]]:
    """Make the stage `clean_events`; return its types, and rows read and left out by reason."""
    readers: dict[str, Reader] = {}
    columns, first_file = event_columns(config), 0
    for name, table in tables_of(config).items():
        fields = event_fields(config, name, table, columns)
        readers[name] = open_source(name, table, fields, first_file)
        first_file = readers[name].tasks[-1][0] + 1
    types = read_tables(engine, config, readers, {})
    num_read, reasons = make_usable(engine, config, types)
    return types, num_read, _clean(engine, config, types, num_read, reasons)


def read_tables(
    engine: SqlEngine,
    config: EventsConfig,
    readers: dict[str, Reader],
    types: dict[str, pa.DataType],
) -> dict[str, pa.DataType]:
    """Make the stage `events_read` of some tables; return its types, which begin with `types`."""
    types = dict(types)
    for reader in readers.values():
        for field in list(reader.schema)[1:]:
            types.setdefault(field.name, field.type)
    for name, feature in config.context.items():
        settle_fill(name, feature, types[f"c_{name}"])
    engine.add_files("events_read", [reader.completed(types) for reader in readers.values()])
    for name, reader in readers.items():
        table = tables_of(config)[name]
        file, first, last = reader.tasks[0][1], reader.tasks[0][0], reader.tasks[-1][0]
        rows = (
            f"events_read WHERE position >= {first << FILE_BITS} AND "
            f"position < {(last + 1) << FILE_BITS}"
        )
        check_unit(engine, name, table, "ts", rows)
        may_clash = config.impressions is not None and name != IMPRESSION
        impressions = f"{rows} AND action = '{IMPRESSION}'"  # events that would be samples
        if may_clash and table.action is not None and (count := count_rows(engine, impressions)):
            raise ValueError(
                f"{file}: column '{table.action}' has '{IMPRESSION}' in {count} rows, which is "
                "the action of `impressions`; rename it, choose other rows by `where`, or "
                "leave `impressions` out"
            )
        if table.where and not count_rows(engine, rows):
            raise ValueError(
                f"{file}: `where` of '{name}' chooses no row: {table.where}; correct its values, "
                "or leave the table out"
            )
    return types


def check_unit(engine: SqlEngine, name: str, table: Source, column: str, rows: str) -> None:
    """Raise a ValueError if all times lie in 1970 and a larger unit puts them near now."""
    larger = {"ms": ["s"], "us": ["ms", "s"]}.get(table.time_unit, [])
    if not larger:
        return
    limits = engine.table(
        f"SELECT min({column}) AS low, max({column}) AS high FROM (SELECT * FROM {rows}) "
        f"WHERE {column} > 0 AND {column} < {FOREVER}"
    )
    low, high = (limits[end][0].as_py() for end in ("low", "high"))
    today, scale = time.time_ns() // 1000, MICROS[table.time_unit]
    for unit in larger:
        factor = MICROS[unit] // scale
        if low is None or high >= YEAR:
            return
        if PLAUSIBLE <= low * factor <= high * factor <= today + YEAR:
            raise ValueError(
                f"{name}: all times lie in 1970 where time_unit is {table.time_unit}; set "
                f"time_unit: {unit}, which fits"
            )


def event_fields(
    config: EventsConfig, name: str, table: EventTable, columns: dict[str, str]
) -> list[Field]:
    """Return the fields to read of a table, `columns` among them with their kinds."""
    fields = [
        Field("uid", table.user, "id"),
        Field("iid", table.item, "id"),
        Field("ts", table.time, "time"),
    ]
    if table.action is None or name == IMPRESSION:
        fields.append(Field("action", "", "text", constant=name))
    else:
        fields.append(Field("action", table.action, "text"))
    if config.by_request and table.request is not None:
        fields.append(Field("request", table.request, "id"))
    if config.has_arrival:
        fields.append(Field("arrived", table.arrived or table.time, "time"))
    names = [column for column in table.columns if column in columns]
    return [*fields, *(Field(f"c_{column}", column, columns[column]) for column in names)]


def make_usable(
    engine: SqlEngine,
    config: EventsConfig,
    types: dict[str, pa.DataType],
    stage: str = "usable",
    since: int | None = None,
) -> tuple[int, dict[str, int]]:
    """Make a stage of usable rows, none arriving before `since`; count those read, and others."""
    latest = latest_moment(config.drop.later_than, config.time_zone)
    problems = {
        "no user": "uid IS NULL",
        "no item": "iid IS NULL",
        "no time": "ts IS NULL",
        "no action": "action IS NULL",
        "in the future": f"ts > {latest}",
    }
    if "arrived" in types:
        problems["no time of arrival"] = "arrived IS NULL"
    reasons = count_by_reason(engine, problems, "events_read")
    num_read = sum(reasons.values())
    reasons.pop("", None)
    conditions = " AND ".join(f"NOT ({problem})" for problem in problems.values())
    columns = {name: quoted(name) for name in types}
    if "arrived" in types:
        first = "" if since is None else f", {since}"
        columns["arrived"] = f"greatest(arrived, ts{first}) AS arrived"
    names = ", ".join(columns.values())
    engine.view(stage, f"SELECT position, {names} FROM events_read WHERE {conditions}")
    return num_read, reasons


def without_copies(
    engine: SqlEngine, config: EventsConfig, types: dict[str, pa.DataType]
) -> tuple[str, dict[str, int]]:
    """Return SQL of `usable` without repeated rows, and their number as a reason."""
    if not config.drop.duplicates:
        return "SELECT * FROM usable", {}
    query = (
        "SELECT u.* FROM usable u LEFT JOIN copies c ON u.position = c.position "
        "WHERE c.position IS NULL"
    )
    return query, {"duplicate": _find_copies(engine, types)}


def _clean(
    engine: SqlEngine,
    config: EventsConfig,
    types: dict[str, pa.DataType],
    num_read: int,
    reasons: dict[str, int],
) -> dict[str, int]:
    """Make `clean_events`: `unique_events` up to each user's limit; return all rows left out."""
    drop, num_usable = config.drop, num_read - sum(reasons.values())
    unique, copies = without_copies(engine, config, types)
    reasons = reasons | copies
    engine.view("unique_events", unique)
    if drop.max_events_per_user is None:
        engine.view("clean_events", "SELECT * FROM unique_events")
    else:  # in the order in which they became known, so that no later event removes an earlier one
        order = f"{config.arrival}, ts, iid, action, position"
        nth = f"row_number() OVER (PARTITION BY uid ORDER BY {order})"
        engine.add(
            "clean_events",
            f"SELECT position, {', '.join(map(quoted, types))} FROM (SELECT *, {nth} AS nth "
            f"FROM unique_events) WHERE nth <= {drop.max_events_per_user}",
        )
    num_clean = count_rows(engine, "clean_events")
    reasons["beyond max_events_per_user"] = num_usable - reasons.get("duplicate", 0) - num_clean
    reasons = {name: count for name, count in reasons.items() if count}
    if not num_clean:
        raise ValueError(
            f"events: none of the {num_read} rows can be used; {reasons} were left out; correct "
            "these columns, or drop.later_than"
        )
    return reasons


def copy_key(types: dict[str, pa.DataType]) -> str:
    """Return the columns in which repeated events agree."""
    return "uid, iid, ts, action" + (", request" if "request" in types else "")


def _find_copies(engine: SqlEngine, types: dict[str, pa.DataType]) -> int:
    """Make the stage `copies`: positions of repeated rows; return their number."""
    key = copy_key(types)
    order = "arrived, position" if "arrived" in types else "position"
    hashed = f"{engine.hash}({key})"
    engine.add(
        "hashes", f"SELECT h FROM (SELECT {hashed} AS h FROM usable) GROUP BY h HAVING count(*) > 1"
    )
    engine.add(
        "copies",
        f"SELECT position FROM (SELECT position, row_number() OVER (PARTITION BY {key} "
        f"ORDER BY {order}) AS nth FROM usable JOIN hashes ON {hashed} = h) WHERE nth > 1",
    )
    return count_rows(engine, "copies")
