"""Tables of items and users, and their columns as they were at a sample's or an event's time."""

from __future__ import annotations

import pyarrow as pa

from embeddings.vocabulary.fixed import is_id_type
from recsys.data.events.engines.base import Engine
from recsys.data.events.files.columns import Field
from recsys.data.events.files.reader import Reader, open_source
from recsys.data.events.rows import count_nulls, is_needed
from recsys.data.events.settings import Content, EventsConfig, ItemTable, Snapshots
from recsys.data.events.signals import (
    FOREVER,
    KINDS,
    check_unit,
    count_rows,
    filled,
    quoted,
    settle_fill,
)
from recsys.data.parquet.values import is_list


def read_snapshots(
    engine: Engine, name: str, table: Snapshots, kind: pa.DataType
) -> dict[str, int]:
    """Make the stage `NAME_snapshots`: id, valid_from, valid_until, features and content.

    `name` is item or user, `kind` the type of its ids in events.

    Returns:
        The number of rows left out, by reason.

    Raises:
        ValueError: a file or column cannot be used, or an id has several rows at one time.
    """
    fields = _fields(table)
    reader = open_source(name, table, fields)
    if (own := reader.schema.field("id").type) != kind:
        raise ValueError(
            f"{reader.tasks[0][1]}: column '{table.id}' has type {own}, but {kind} in the events; "
            "write one type"
        )
    _settle_columns(table, reader)
    engine.add_files(f"{name}_read", [reader])
    begin = str(-FOREVER) if table.valid_from is None else "valid_from"
    end = f"lead({begin}) OVER (PARTITION BY id ORDER BY {begin})"
    others = ", ".join(quoted(field.name) for field in fields if field.name != "valid_from")
    names = ", ".join(quoted(field.name) for field in fields)
    usable = f"id IS NOT NULL AND {begin} IS NOT NULL"
    if table.valid_from is not None:
        check_unit(engine, f"{name}s", table, "valid_from", f"{name}_read")
    first = f"min({begin}) OVER (PARTITION BY id)"
    distinct = f"SELECT DISTINCT {names} FROM {name}_read WHERE {usable}"
    engine.add(
        f"{name}_snapshots",
        f"SELECT {others}, {begin} AS valid_from, coalesce({end}, {FOREVER}) AS valid_until, "
        f"{first} AS first_valid_from FROM ({distinct})",
    )
    _check_unique(engine, name, table, reader.tasks[0][1])
    key = "iid" if name == "item" else "uid"
    match = f"SELECT id FROM signals JOIN {name}_snapshots ON {key} = id LIMIT 1"
    if not engine.table(match).num_rows:
        raise ValueError(
            f"{reader.tasks[0][1]}: column '{table.id}': no event has one of these ids; correct "
            f"the column, or leave {name}s out"
        )
    count = count_rows(engine, f"{name}_read WHERE NOT ({usable})")
    return {f"{name} without id or time": count} if count else {}


def _fields(table: Snapshots) -> list[Field]:
    fields = [Field("id", table.id, "id")]
    if table.valid_from is not None:
        fields.append(Field("valid_from", table.valid_from, "time"))
    fields += [Field(f"f_{name}", name, KINDS[of.kind]) for name, of in table.columns.items()]
    if isinstance(table, ItemTable):
        for column, content in table.content.items():
            form = "words" if content.kind == "text" else "any"
            form = form if content.path_column is None else "text"
            fields.append(Field(f"t_{column}", content.path_column or column, form))
    return fields


def _settle_columns(table: Snapshots, reader: Reader) -> None:
    """Check fills and content by the types of the columns, and give fills these types."""
    for column, feature in table.columns.items():
        settle_fill(column, feature, reader.schema.field(f"f_{column}").type)
    if isinstance(table, ItemTable):
        for column, content in table.content.items():
            _check_content(reader.tasks[0][1], column, content, reader.schema.field(f"t_{column}"))


def _check_content(file: str, name: str, content: Content, field: pa.Field) -> None:
    """Raise a ValueError for content of a type that no dataset has."""
    own = field.type
    value = own.value_type if is_list(own) else own
    last = value.value_type if is_list(value) else value
    is_number = pa.types.is_floating(last) or (last == own and pa.types.is_integer(own))
    fits = {
        "text": pa.types.is_string(own) or pa.types.is_large_string(own),
        "image": pa.types.is_binary(value) or pa.types.is_large_binary(value),
        "feature": is_number,
        "category": is_id_type(value) or pa.types.is_null(value),
    }
    if content.path_column is None and not fits.get(content.kind, True):
        wanted = {
            "text": "string",
            "image": "binary, or path_column",
            "feature": "a number, list<float> or list<list<float>>",
            "category": "integer or string, or a list of them",
        }[content.kind]
        raise ValueError(f"{file}: column '{name}' has type {own}, expected {wanted}; write it so")


def _check_unique(engine: Engine, name: str, table: Snapshots, file: str) -> None:
    """Raise a ValueError if an id has several rows at one time."""
    twice = engine.table(
        f"SELECT min(id) AS id FROM (SELECT id FROM {name}_snapshots "
        "GROUP BY id, valid_from HAVING count(*) > 1)"
    )["id"][0].as_py()
    if twice is not None:
        raise ValueError(
            f"{file}: column '{table.id}': {twice} has several rows"
            + (" of one time; keep one" if table.valid_from else "; keep one, or set valid_from")
        )


def with_columns(source: str, table: str, key: str, columns: dict[str, str], of: Snapshots) -> str:
    """Return SQL that adds columns of the snapshot that was valid at each row's time.

    Args:
        source: SQL with `key` and `ts`.
        table: name of the stage without `_snapshots`.
        key: column that holds the ids.
        columns: new name of each column.
        of: the table's settings, for values that stand for null.
    """
    names = ", ".join(
        filled(f"t.{quoted(f'f_{name}')}", of.columns[name].fill, new)
        for name, new in columns.items()
    )
    return (
        f"SELECT s.*, {names} FROM ({source}) s LEFT JOIN {table}_snapshots t ON s.{key} = t.id "
        "AND s.ts >= t.valid_from AND s.ts < t.valid_until"
    )


def add_features(engine: Engine, config: EventsConfig, source: str) -> dict[str, int]:
    """Make the stage `samples` of `source`, with the features of items and users.

    Returns:
        The number of samples left out, by reason.
    """
    query = f"SELECT * FROM {source}"
    needed: dict[str, str] = {}
    for table, name, key in ((config.items, "item", "iid"), (config.users, "user", "uid")):
        if table is None or not table.columns:
            continue
        columns = {column: f"c_{column}" for column in table.columns}
        query = with_columns(query, name, key, columns, table)
        needed |= {
            f"no value in '{column}'": f"c_{column}"
            for column, feature in table.columns.items()
            if is_needed(config, feature.kind)
        }
    if not needed:
        engine.view("samples", query)
        return {}
    engine.add("enriched", query)
    kept = " AND ".join(f"{quoted(column)} IS NOT NULL" for column in needed.values())
    engine.view("samples", f"SELECT * FROM enriched WHERE {kept}")
    reasons = count_nulls(engine, "enriched", needed)
    if not count_rows(engine, "samples"):
        raise ValueError(f"rows: none is left; {reasons} were left out; correct these columns")
    return reasons
