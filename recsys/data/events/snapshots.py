"""Tables of items and users: columns as they were at a sample's or an event's time, and pictures.

Pictures that the item table names by path go as bytes into the items of the dataset.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.vocabulary.fixed import is_id_type
from recsys.data.events.clean_events import KINDS, check_unit, settle_fill
from recsys.data.events.file_columns import Field
from recsys.data.events.reader import open_source
from recsys.data.events.samples import complete_rows, required_features
from recsys.data.events.settings import Content, EventsConfig, ItemTable, Snapshots
from recsys.data.events.sql import FOREVER, SqlEngine, count_rows, filled, one_value, quoted
from recsys.data.items.images import check_first_image
from recsys.data.parquet.values import is_list
from recsys.storage.files import whole_file
from recsys.storage.location import Location


def read_snapshots(
    engine: SqlEngine,
    name: str,
    table: Snapshots,
    kind: pa.DataType,
    must_match: bool = True,
    available_from: str | None = None,
) -> dict[str, int]:
    """Make the stage `NAME_snapshots`: id, valid_from, valid_until, features and content.

    `name` is item or user, `kind` the type of its ids. Rows left out are counted by reason. Ids
    with several rows at one time, or, with `must_match`, without any event, are a ValueError.
    `available_from` is a column of times to read, too.
    """
    fields = _fields(table, available_from)
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
    for field in fields:
        if field.kind == "time":
            check_unit(engine, f"{name}s", table, field.name, f"{name}_read")
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
    if must_match and not engine.table(match).num_rows:
        raise ValueError(
            f"{file}: column '{table.id}': no event has one of these ids; correct "
            f"the column, or leave {name}s out"
        )
    count = count_rows(engine, f"{name}_read WHERE NOT ({usable})")
    return {f"{name} without id or time": count} if count else {}


def _fields(table: Snapshots, available_from: str | None) -> list[Field]:
    fields = [Field("id", table.id, "id")]
    if table.valid_from is not None:
        fields.append(Field("valid_from", table.valid_from, "time"))
    if available_from is not None:
        fields.append(Field("available_from", available_from, "time"))
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


def add_features(
    engine: SqlEngine, config: EventsConfig, source: str, may_be_empty: bool = False
) -> dict[str, int]:
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
    if not may_be_empty and not count_rows(engine, "samples"):
        raise ValueError(f"rows: none is left; {reasons} were left out; correct these columns")
    return reasons


PICTURES_PER_GROUP = 128  # pictures in memory at once
READERS = 16  # at once: a picture from a URL is mostly waited for


def named_pictures(items: ItemTable) -> dict[str, Content]:
    """Return the contents whose pictures are files."""
    return {name: part for name, part in items.content.items() if part.path_column is not None}


def check_pictures(engine: SqlEngine, items: ItemTable) -> None:
    """Raise a ValueError if the first picture of a column is none, or a local file is missing."""
    for name, content in named_pictures(items).items():
        path = quoted(f"t_{name}")
        paths = engine.table(
            f"SELECT DISTINCT id, {path} AS path FROM item_snapshots WHERE {path} <> '' "
            "ORDER BY 1, 2"
        )
        rows = zip(paths["id"].to_pylist(), paths["path"].to_pylist(), strict=True)
        for place, (item, path) in enumerate(rows):
            file = _location(content, path)
            if place == 0:
                where = f"{file}: the picture of item {item}"
                check_first_image([(pa.array([_read(content, item, path)]), where)])
            elif file.is_local and not file.exists():
                raise ValueError(_missing(file, content, item))


def add_pictures(folder: Path, items: ItemTable, id_column: str) -> None:
    """Replace paths by the bytes of their files in the items' Parquet files."""
    contents = named_pictures(items)
    if not contents:
        return
    for file in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(file) as source, whole_file(file) as partial:
            schema = source.schema_arrow
            for name in contents:
                schema = schema.set(schema.get_field_index(name), pa.field(name, pa.binary()))
            with (
                pq.ParquetWriter(
                    partial, schema, compression="zstd", write_page_checksum=True
                ) as writer,
                ThreadPoolExecutor(READERS) as readers,
            ):
                for batch in source.iter_batches(PICTURES_PER_GROUP):
                    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                    for name, content in contents.items():
                        read = readers.map(
                            lambda item, path, content=content: _read(content, item, path),
                            columns[id_column].to_pylist(),
                            columns[name].to_pylist(),
                        )
                        columns[name] = pa.array(list(read), pa.binary())
                    writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))


def _read(content: Content, item: object, path: str | None) -> bytes | None:
    """Return the bytes of an item's picture; None if it has none."""
    if not path:
        return None
    file = _location(content, path)
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(_missing(file, content, item)) from error
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error}); item {item} names it") from error


def _location(content: Content, path: str) -> Location:
    assert content.folder is not None  # set when the settings are loaded
    if "://" in path or path.startswith("/"):
        return Location.of(path)
    return Location.of(content.folder) / path


def _missing(file: Location, content: Content, item: object) -> str:
    return (
        f"{file}: no such file; item {item} names it in column '{content.path_column}'; correct "
        "the path, set `folder`, or leave the value empty"
    )
