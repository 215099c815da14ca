"""Reads events and impressions as one stage, `signals`, and leaves out what cannot be used."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pyarrow as pa

from recsys.data.events.engines.base import Engine
from recsys.data.events.files.columns import LARGEST, Field
from recsys.data.events.files.reader import FILE_BITS, Reader, open_source
from recsys.data.events.settings import EventsConfig, EventTable, Feature, Source
from recsys.data.events.times import DURATIONS, MICROS, moment

FOREVER = 2**62  # later than any time
YEAR = 365 * DURATIONS["d"] * MICROS["s"]
PLAUSIBLE = 20 * YEAR  # a log that begins later may be one of this time
IMPRESSION = "impression"  # the action of impressions
KINDS = {"id": "id", "ids": "ids", "dense": "number"}  # of features, as fields


@dataclass(frozen=True)
class Dropped:
    """Rows of a table that were read, and how many of them were left out, by reason."""

    read: int
    reasons: dict[str, int]


def quoted(name: str) -> str:
    """Return a name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return a text as SQL writes it."""
    if "'" in text or "\\" in text:
        raise ValueError(f"action {text!r}: quotes and backslashes cannot be in it; rename it")
    return f"'{text}'"


def settle_fill(name: str, feature: Feature, kind: pa.DataType) -> None:
    """Give the value that stands for a feature's nulls the type of its column, in place.

    Raises:
        ValueError: it is no value of that type.
    """
    fill = feature.fill
    if fill is None:
        return
    if isinstance(fill, str) and {"'", "\\"} & set(fill):
        raise ValueError(f"'{name}': fill {fill!r} has a quote or a backslash; write another text")
    if kind == pa.string() and isinstance(fill, int):  # YAML reads 7 as an integer
        fill = feature.fill = str(fill)
    wanted = {pa.string(): str, pa.int64(): int, pa.float64(): (int, float)}.get(kind, ())
    if not isinstance(fill, wanted) or (feature.kind == "dense" and not abs(fill) <= LARGEST):  # type: ignore[arg-type]
        raise ValueError(f"'{name}': fill is {fill!r}, but the column has type {kind}; correct it")


def filled(column: str, fill: float | int | str | None, name: str) -> str:
    """Return SQL of a column with its nulls filled, under a name."""
    if fill is not None:
        column = f"coalesce({column}, {literal(fill) if isinstance(fill, str) else fill})"
    return f"{column} AS {quoted(name)}"


def event_columns(config: EventsConfig) -> dict[str, str]:
    """Return the columns of events that something uses, with the kinds of their fields."""
    items = config.items.columns if config.items else {}
    used = [label.column for label in config.labels.values() if label.column is not None]
    for history in config.histories.values():
        used += [part.column for part in history.parallel.values()]
    kinds = {name: KINDS[feature.kind] for name, feature in config.context.items()}
    for name in used:
        if name not in ("age", "action") and name not in items:
            kinds.setdefault(name, "number")
    return kinds


def read_signals(engine: Engine, config: EventsConfig) -> tuple[dict[str, pa.DataType], Dropped]:
    """Make the stage `signals`: events, and impressions as events of that action.

    Returns:
        The type of each column, and what was left out.

    Raises:
        ValueError: a file or column cannot be used, tables do not agree in a type, or no row is
            left.
    """
    tables = dict(config.events)
    if config.impressions is not None:
        tables[IMPRESSION] = config.impressions
    columns = event_columns(config)
    readers: list[Reader] = []
    types: dict[str, pa.DataType] = {}
    for name, table in tables.items():
        first_file = readers[-1].tasks[-1][0] + 1 if readers else 0
        fields = _fields(name, table, columns, config.by_request, config.has_arrival)
        readers.append(open_source(name, table, fields, first_file))
        for field in list(readers[-1].schema)[1:]:
            types.setdefault(field.name, field.type)
    for name, feature in config.context.items():
        settle_fill(name, feature, types[f"c_{name}"])
    engine.add_files("signals_read", [reader.completed(types) for reader in readers])
    for (name, table), reader in zip(tables.items(), readers, strict=True):
        rows = f"signals_read WHERE {_is_of(reader)}"
        check_unit(engine, name, table, "ts", rows)
        if config.impressions is not None and name != IMPRESSION and table.action is not None:
            _check_no_impressions(engine, reader.tasks[0][1], table.action, rows)
        if table.where and not count_rows(engine, rows):
            raise ValueError(
                f"{reader.tasks[0][1]}: `where` of '{name}' chooses no row: {table.where}; correct "
                "its values, or leave the table out"
            )
    return types, _clean(engine, config, types)


def _check_no_impressions(engine: Engine, file: str, column: str, rows: str) -> None:
    """Raise a ValueError if events have the action of impressions, as they would be samples."""
    if count := count_rows(engine, f"{rows} AND action = '{IMPRESSION}'"):
        raise ValueError(
            f"{file}: column '{column}' has '{IMPRESSION}' in {count} rows, which is the action of "
            "`impressions`; rename it, choose other rows by `where`, or leave `impressions` out"
        )


def _is_of(reader: Reader) -> str:
    """Return an SQL condition on the positions of rows: they are of the files of a table."""
    first, last = (reader.tasks[place][0] for place in (0, -1))
    return f"position >= {first << FILE_BITS} AND position < {(last + 1) << FILE_BITS}"


def check_unit(engine: Engine, name: str, table: Source, column: str, rows: str) -> None:
    """Raise a ValueError if all times of a table lie in 1970 and a larger unit puts them near now.

    `rows` are a stage and the condition of the table's rows; times of 0 and below are ignored.
    """
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
        if (
            low is not None
            and high < YEAR
            and PLAUSIBLE <= low * factor <= high * factor <= today + YEAR
        ):
            raise ValueError(
                f"{name}: all times lie in 1970 where time_unit is {table.time_unit}; set "
                f"time_unit: {unit}, which fits"
            )


def _fields(
    name: str, table: EventTable, columns: dict[str, str], by_request: bool, has_arrival: bool
) -> list[Field]:
    fields = [
        Field("uid", table.user, "id"),
        Field("iid", table.item, "id"),
        Field("ts", table.time, "time"),
    ]
    if table.action is None or name == IMPRESSION:
        fields.append(Field("action", "", "text", constant=name))
    else:
        fields.append(Field("action", table.action, "text"))
    if by_request and table.request is not None:
        fields.append(Field("request", table.request, "id"))
    if has_arrival:
        fields.append(Field("arrived", table.arrived or table.time, "time"))
    kept = [column for column in table.columns if column in columns]
    return [*fields, *(Field(f"c_{column}", column, columns[column]) for column in kept)]


def _clean(engine: Engine, config: EventsConfig, types: dict[str, pa.DataType]) -> Dropped:
    """Make the stage `signals` of `signals_read`."""
    drop, zone = config.drop, config.time_zone
    latest = time.time_ns() // 1000 if drop.later_than is None else moment(drop.later_than, zone)
    problems = {
        "no user": "uid IS NULL",
        "no item": "iid IS NULL",
        "no time": "ts IS NULL",
        "no action": "action IS NULL",
        "in the future": f"ts > {latest}",
    }
    if "arrived" in types:
        problems["no time of arrival"] = "arrived IS NULL"
    cases = " ".join(f"WHEN {test} THEN '{name}'" for name, test in problems.items())
    counted = engine.table(
        f"SELECT CASE {cases} ELSE '' END AS reason, count(*) AS n FROM signals_read GROUP BY 1"
    )
    reasons = dict(zip(counted["reason"].to_pylist(), counted["n"].to_pylist(), strict=True))
    read, usable = sum(reasons.values()), reasons.pop("", 0)
    conditions = " AND ".join(f"NOT ({problem})" for problem in problems.values())
    columns = {name: quoted(name) for name in types}
    if "arrived" in types:
        columns["arrived"] = "greatest(arrived, ts) AS arrived"
    names = ", ".join(columns.values())
    engine.view("usable", f"SELECT position, {names} FROM signals_read WHERE {conditions}")
    left, once = usable, "SELECT * FROM usable"
    if drop.duplicates:
        left -= reasons.setdefault("duplicate", _find_copies(engine, types))
        once = (
            "SELECT u.* FROM usable u LEFT JOIN copies c ON u.position = c.position "
            "WHERE c.position IS NULL"
        )
    engine.view("signals_once", once)
    if drop.max_events_per_user is None:
        engine.view("signals", "SELECT * FROM signals_once")
    else:
        _add_first_events(engine, config, types, drop.max_events_per_user)
    reasons["beyond max_events_per_user"] = left - count_rows(engine, "signals")
    reasons = {name: count for name, count in reasons.items() if count}
    if not count_rows(engine, "signals"):
        raise ValueError(
            f"events: none of the {read} rows can be used; {reasons} were left out; correct these "
            "columns, or drop.later_than"
        )
    return Dropped(read, reasons)


def _add_first_events(
    engine: Engine, config: EventsConfig, types: dict[str, pa.DataType], most: int
) -> None:
    """Make the stage `signals` of each user's first events.

    They are ordered as they became known, so that no later event removes an earlier one.
    """
    order = f"{config.arrival}, ts, iid, action, position"
    nth = f"row_number() OVER (PARTITION BY uid ORDER BY {order})"
    engine.add(
        "signals",
        f"SELECT position, {', '.join(map(quoted, types))} FROM (SELECT *, {nth} AS nth "
        f"FROM signals_once) WHERE nth <= {most}",
    )


def _find_copies(engine: Engine, types: dict[str, pa.DataType]) -> int:
    """Make the stage `copies`: positions of rows whose key an earlier row has; return their number.

    Only rows whose hash is not the only one are compared, which are few.
    """
    key = "uid, iid, ts, action" + (", request" if "request" in types else "")
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


def count_rows(engine: Engine, stage: str) -> int:
    """Return the number of rows of a stage, or of those that a WHERE after its name chooses."""
    return int(engine.table(f"SELECT count(*) AS n FROM {stage}")["n"][0].as_py())
