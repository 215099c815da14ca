"""Read events and impressions into the stage `clean_events`, without unusable rows."""

from operator import itemgetter

import pyarrow as pa

from recsys.data.events.file_columns import LARGEST, Field, Types
from recsys.data.events.reader import FILE_BITS, Reader, open_source
from recsys.data.events.settings import IMPRESSION, EventsConfig, Feature, Source
from recsys.data.events.sql import FOREVER, SqlEngine, aligned, listed, quoted
from recsys.data.events.times import DAY, MICROS, now

YEAR = 365 * DAY
PLAUSIBLE = 20 * YEAR  # a first event after this time (1990) is plausible for a log
KINDS = {"id": "id", "ids": "ids", "dense": "number"}  # kind of a feature -> kind of its field


def settle_fill(name: str, feature: Feature, kind: pa.DataType) -> None:
    """Convert a feature's `fill` to its column's type, in place; an unfit value is a ValueError."""
    if (fill := feature.fill) is None:
        return
    if isinstance(fill, str) and {"'", "\\"} & set(fill):
        raise ValueError(f"'{name}': fill {fill!r} has a quote or a backslash; write another text")
    if kind == pa.string() and isinstance(fill, int):  # YAML reads 7 as an integer
        fill = feature.fill = str(fill)
    types = {pa.string(): str, pa.int64(): int, pa.float64(): (int, float)}.get(kind, ())
    if not isinstance(fill, types) or (feature.kind == "dense" and not abs(fill) <= LARGEST):  # type: ignore[arg-type]
        raise ValueError(f"'{name}': fill is {fill!r}, but the column has type {kind}; correct it")


def event_columns(config: EventsConfig) -> dict[str, str]:
    """Return the columns of events that the settings use, with the kinds of their fields."""
    names = [label.column for label in config.labels.values() if label.column is not None]
    names += [parallel.column for parallel in config.parallels.values()] + config.late
    if config.weight is not None and config.weight.column is not None:
        names.append(config.weight.column)
    kinds = {name: KINDS[feature.kind] for name, feature in config.context.items()}
    for name in names:
        if name not in ("age", "action", *config.item_features):
            kinds.setdefault(name, "number")
    return kinds


def read_events(engine: SqlEngine, config: EventsConfig) -> tuple[Types, int, dict[str, int]]:
    """Make the stage `clean_events`; return types, rows read, and rows left out by reason."""
    readers: dict[str, Reader] = {}
    first_file = 0
    for name, table in config.tables.items():
        readers[name] = open_source(name, table, event_fields(config, name), first_file)
        first_file = readers[name].tasks[-1][0] + 1
    types = read_tables(engine, config, readers, {})
    usable, num_read, reasons = usable_rows(engine, config, types)
    engine.view("usable", usable)
    unique, num_copies = without_copies(engine, config, types)
    engine.view("unique_events", unique)
    max_events = config.drop.max_events_per_user
    if max_events is None:
        engine.view("clean_events", "SELECT * FROM unique_events")
    else:  # ordered by arrival, so that no later event removes an earlier one
        order = f"{config.arrival}, ts, iid, action, position"
        nth = f"row_number() OVER (PARTITION BY uid ORDER BY {order})"
        rows = f"SELECT *, {nth} AS nth FROM unique_events"
        names = listed(["position", *types])
        engine.add("clean_events", f"SELECT {names} FROM ({rows}) WHERE nth <= {max_events}")
    num_clean = engine.count_rows("clean_events")
    beyond = num_read - sum(reasons.values()) - num_copies - num_clean
    reasons |= {"duplicate": num_copies, "beyond max_events_per_user": beyond}
    reasons = {reason: count for reason, count in reasons.items() if count}
    if not num_clean:
        raise ValueError(
            f"events: none of the {num_read} rows can be used; {reasons} were left out; correct "
            "these columns, or drop.later_than"
        )
    return types, num_read, reasons


def read_tables(
    engine: SqlEngine, config: EventsConfig, readers: dict[str, Reader], types: Types
) -> Types:
    """Make the stage `events_read` of some tables; return its types, which begin with `types`.

    `types` are the column types that earlier calls have stored; they are empty in a first call.
    """
    is_first, types = not types, dict(types)
    fields = [
        (field.name in reader.untyped, field)
        for reader in readers.values()
        for field in list(reader.schema)[1:]
    ]
    for _, field in sorted(fields, key=itemgetter(0)):  # typed columns override untyped ones
        types.setdefault(field.name, field.type)
    for name, feature in config.context.items():
        settle_fill(name, feature, types[f"c_{name}"])
    engine.add_files("events_read", [reader.completed(types) for reader in readers.values()])
    for name, reader in readers.items():
        table, file = config.tables[name], reader.tasks[0][1]
        begin, end = reader.tasks[0][0] << FILE_BITS, (reader.tasks[-1][0] + 1) << FILE_BITS
        rows = f"events_read WHERE position >= {begin} AND position < {end}"
        check_unit(engine, name, table, "ts", rows)
        may_clash = config.impressions is not None and name != IMPRESSION
        impressions = f"{rows} AND action = '{IMPRESSION}'"  # events that would be samples
        if may_clash and table.action is not None and (count := engine.count_rows(impressions)):
            raise ValueError(
                f"{file}: column '{table.action}' has '{IMPRESSION}' in {count} rows, which is "
                "the action of `impressions`; rename it, choose other rows by `where`, or "
                "leave `impressions` out"
            )
        if is_first and table.where and not engine.count_rows(rows):
            raise ValueError(
                f"{file}: `where` of '{name}' chooses no row: {table.where}; correct its values, "
                "or leave the table out"
            )
    return types


def check_unit(engine: SqlEngine, name: str, table: Source, column: str, rows: str) -> None:
    """Raise a ValueError if all times lie in 1970 and a larger unit makes them plausible."""
    larger = {"ms": ["s"], "us": ["ms", "s"]}.get(table.time_unit, [])
    if not larger:
        return
    limits = engine.table(
        f"SELECT min({column}) AS low, max({column}) AS high FROM (SELECT * FROM {rows}) "
        f"WHERE {column} > 0 AND {column} < {FOREVER}"
    )
    earliest, latest = (limits[end][0].as_py() for end in ("low", "high"))
    if earliest is None or latest >= YEAR:
        return
    for unit in larger:
        factor = MICROS[unit] // MICROS[table.time_unit]
        if PLAUSIBLE <= earliest * factor <= latest * factor <= now() + YEAR:
            raise ValueError(
                f"{name}: all times lie in 1970 where time_unit is {table.time_unit}; set "
                f"time_unit: {unit}, which fits"
            )


def event_fields(config: EventsConfig, name: str) -> list[Field]:
    """Return the fields to read of a table of events or impressions."""
    table, columns = config.tables[name], event_columns(config)
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


def usable_rows(
    engine: SqlEngine, config: EventsConfig, types: Types, begin: int = -FOREVER
) -> tuple[str, int, dict[str, int]]:
    """Return SQL of usable rows, which arrive from `begin` on; count rows read and unusable."""
    required = {"user": "uid", "item": "iid", "time": "ts", "action": "action"}
    problems = {f"no {name}": f"{column} IS NULL" for name, column in required.items()}
    problems["in the future"] = f"ts > {config.latest}"
    if "arrived" in types:
        problems["no time of arrival"] = "arrived IS NULL"
    reasons = engine.count_by_reason(problems, "events_read")
    num_read = sum(reasons.values())
    reasons.pop("", None)
    conditions = " AND ".join(f"NOT ({problem})" for problem in problems.values())
    columns = {name: quoted(name) for name in ("position", *types)}
    if "arrived" in types:
        columns["arrived"] = f"greatest(arrived, ts, {begin})"
    query = f"SELECT {aligned(columns, columns)} FROM events_read WHERE {conditions}"
    return query, num_read, reasons


def without_copies(engine: SqlEngine, config: EventsConfig, types: Types) -> tuple[str, int]:
    """Return SQL of `usable` without repeated rows, and the number of repeated rows."""
    if not config.drop.duplicates:
        return "SELECT * FROM usable", 0
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
    query = "SELECT * FROM usable ANTI JOIN copies USING (position)"
    return query, engine.count_rows("copies")


def copy_key(types: Types) -> str:
    """Return SQL of the columns that are equal in repeated events."""
    return "uid, iid, ts, action" + (", request" if "request" in types else "")
