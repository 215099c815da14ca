"""Tables of items and users, and their columns as they were at a sample's or an event's time."""

from __future__ import annotations

import pyarrow as pa

from embeddings.vocabulary.fixed import is_id_type
from recsys.data.events.clean_events import KINDS, check_unit, settle_fill
from recsys.data.events.file_columns import Field
from recsys.data.events.reader import open_source
from recsys.data.events.samples import complete_rows, required_features
from recsys.data.events.settings import Content, EventsConfig, ItemTable, Snapshots
from recsys.data.events.sql import FOREVER, SqlEngine, count_rows, filled, one_value, quoted
from recsys.data.parquet.values import is_list


def read_snapshots(
    engine: SqlEngine, name: str, table: Snapshots, kind: pa.DataType
) -> dict[str, int]:
    """Make the stage `NAME_snapshots`: id, valid_from, valid_until, features and content.

    `name` is item or user, `kind` the type of its ids. Rows left out are counted by reason.

    Raises:
        ValueError: a file or column cannot be used, or an id has several rows at one time.
    """
    fields = _fields(table)
    reader = open_source(name, table, fields)
    file, id_kind = reader.tasks[0][1], reader.schema.field("id").type
    if id_kind != kind:
        raise ValueError(
            f"{file}: column '{table.id}' has type {id_kind}, but {kind} in the events; write one "
            "type"
        )
    for column, feature in table.columns.items():
        settle_fill(column, feature, reader.schema.field(f"f_{column}").type)
    if isinstance(table, ItemTable):
        for column, content in table.content.items():
            _check_content(file, column, content, reader.schema.field(f"t_{column}").type)
    engine.add_files(f"{name}_read", [reader])
    begin = str(-FOREVER) if table.valid_from is None else "valid_from"
    end = f"lead({begin}) OVER (PARTITION BY id ORDER BY {begin})"
    columns = ", ".join(quoted(field.name) for field in fields if field.name != "valid_from")
    names = ", ".join(quoted(field.name) for field in fields)
    usable = f"id IS NOT NULL AND {begin} IS NOT NULL"
    if table.valid_from is not None:
        check_unit(engine, f"{name}s", table, "valid_from", f"{name}_read")
    first = f"min({begin}) OVER (PARTITION BY id)"
    distinct = f"SELECT DISTINCT {names} FROM {name}_read WHERE {usable}"
    engine.add(
        f"{name}_snapshots",
        f"SELECT {columns}, {begin} AS valid_from, coalesce({end}, {FOREVER}) AS valid_until, "
        f"{first} AS first_valid_from FROM ({distinct})",
    )
    _check_unique(engine, name, table, file)
    key = "iid" if name == "item" else "uid"
    match = f"SELECT id FROM clean_events JOIN {name}_snapshots ON {key} = id LIMIT 1"
    if not engine.table(match).num_rows:
        raise ValueError(
            f"{file}: column '{table.id}': no event has one of these ids; correct "
            f"the column, or leave {name}s out"
        )
    count = count_rows(engine, f"{name}_read WHERE NOT ({usable})")
    return {f"{name} without id or time": count} if count else {}


def _fields(table: Snapshots) -> list[Field]:
    fields = [Field("id", table.id, "id")]
    if table.valid_from is not None:
        fields.append(Field("valid_from", table.valid_from, "time"))
    fields += [
        Field(f"f_{name}", name, KINDS[feature.kind]) for name, feature in table.columns.items()
    ]
    if isinstance(table, ItemTable):
        for column, content in table.content.items():
            form = "words" if content.kind == "text" else "any"
            form = form if content.path_column is None else "text"
            fields.append(Field(f"t_{column}", content.path_column or column, form))
    return fields


def _check_content(file: str, name: str, content: Content, kind: pa.DataType) -> None:
    value = kind.value_type if is_list(kind) else kind
    number = value.value_type if is_list(value) else value
    is_integer = number == kind and pa.types.is_integer(kind)
    fits = {
        "text": pa.types.is_string(kind) or pa.types.is_large_string(kind),
        "image": pa.types.is_binary(value) or pa.types.is_large_binary(value),
        "feature": pa.types.is_floating(number) or is_integer,
        "category": is_id_type(value) or pa.types.is_null(value),
    }
    if content.path_column is None and not fits.get(content.kind, True):
        expected = {
            "text": "string",
            "image": "binary, or path_column",
            "feature": "a number, list<float> or list<list<float>>",
            "category": "integer or string, or a list of them",
        }[content.kind]
        raise ValueError(
            f"{file}: column '{name}' has type {kind}, expected {expected}; write it so"
        )


def _check_unique(engine: SqlEngine, name: str, table: Snapshots, file: str) -> None:
    rows = f"SELECT id FROM {name}_snapshots GROUP BY id, valid_from HAVING count(*) > 1"
    repeated = one_value(engine, "min(id)", f"({rows})")
    if repeated is not None:
        raise ValueError(
            f"{file}: column '{table.id}': {repeated} has several rows"
            + (" of one time; keep one" if table.valid_from else "; keep one, or set valid_from")
        )


def with_columns(
    source: str, name: str, key: str, columns: dict[str, str], table: Snapshots
) -> str:
    """Return SQL that adds columns of the snapshot that was valid at each row's time.

    `source` is SQL with `key`, the column of ids, and `ts`; `columns` has the new names.
    """
    names = ", ".join(
        filled(f"t.{quoted(f'f_{column}')}", table.columns[column].fill, new)
        for column, new in columns.items()
    )
    return (
        f"SELECT s.*, {names} FROM ({source}) s LEFT JOIN {name}_snapshots t ON s.{key} = t.id "
        "AND s.ts >= t.valid_from AND s.ts < t.valid_until"
    )


def add_features(engine: SqlEngine, config: EventsConfig, source: str) -> dict[str, int]:
    """Make the stage `samples` of `source` with item and user features; count those left out."""
    query = f"SELECT * FROM {source}"
    required: dict[str, str] = {}
    for table, name, key in ((config.items, "item", "iid"), (config.users, "user", "uid")):
        if table is not None and table.columns:
            columns = {column: f"c_{column}" for column in table.columns}
            query = with_columns(query, name, key, columns, table)
            required |= required_features(config, list(table.columns))
    if not required:
        engine.view("samples", query)
        return {}
    engine.add("enriched", query)
    is_complete, reasons = complete_rows(engine, "enriched", required)
    engine.view("samples", f"SELECT * FROM enriched WHERE {is_complete}")
    if not count_rows(engine, "samples"):
        raise ValueError(f"rows: none is left; {reasons} were left out; correct these columns")
    return reasons
