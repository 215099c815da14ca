"""Tables of items and users: columns as they were at the time of a row, and pictures."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.vocabulary.fixed import is_id_type
from recsys.data.events.clean_events import KINDS, check_unit, settle_fill
from recsys.data.events.file_columns import Field
from recsys.data.events.reader import open_source
from recsys.data.events.samples import complete_rows, required_features
from recsys.data.events.settings import Content, EventsConfig, Feature, ItemTable, Snapshots
from recsys.data.events.sql import FOREVER, SqlEngine, aligned, filled, listed, quoted
from recsys.data.events.times import is_text
from recsys.data.items.images import check_first_image
from recsys.data.parquet.values import is_list
from recsys.storage.files import atomic_file
from recsys.storage.location import Location


def read_snapshots(
    engine: SqlEngine, config: EventsConfig, types: dict[str, pa.DataType], must_match: bool = True
) -> dict[str, int]:
    """Make the stages `item_snapshots` and `user_snapshots`; return rows left out by reason.

    Columns are id, valid_from, valid_until, features and content. `types` are of the events. An id
    with several rows at one time, or with `must_match` a table without events, is a ValueError.
    """
    reasons: dict[str, int] = {}
    for name, key, table in snapshot_tables(config):
        fields = _fields(config, table)
        reader = open_source(name, table, fields)
        file = reader.tasks[0][1]
        _check_types(file, table, reader.schema, types[key])
        engine.add_files(f"{name}_read", [reader])
        begin = str(-FOREVER) if table.valid_from is None else "valid_from"
        end = f"lead({begin}) OVER (PARTITION BY id ORDER BY {begin})"
        usable = f"id IS NOT NULL AND {begin} IS NOT NULL"
        columns = listed(field.name for field in fields if field.name != "valid_from")
        for field in fields:
            if field.kind == "time":
                check_unit(engine, f"{name}s", table, field.name, f"{name}_read")
        engine.add(
            f"{name}_snapshots",
            f"SELECT {columns}, {begin} AS valid_from, coalesce({end}, {FOREVER}) AS valid_until, "
            f"min({begin}) OVER (PARTITION BY id) AS first_valid_from FROM (SELECT DISTINCT "
            f"{listed(field.name for field in fields)} FROM {name}_read WHERE {usable})",
        )
        _check_unique(engine, name, table, file)
        match = f"SELECT id FROM clean_events JOIN {name}_snapshots ON {key} = id LIMIT 1"
        if must_match and not engine.table(match).num_rows:
            raise ValueError(
                f"{file}: column '{table.id}': no event has one of these ids; correct "
                f"the column, or leave {name}s out"
            )
        if count := engine.count_rows(f"{name}_read WHERE NOT ({usable})"):
            reasons[f"{name} without id or time"] = count
        if isinstance(table, ItemTable):
            _check_pictures(engine, table)
    return reasons


def snapshot_tables(config: EventsConfig) -> Iterator[tuple[str, str, Snapshots]]:
    """Yield name, column of ids in events, and table of the items and the users, if configured."""
    for name, key, table in (("item", "iid", config.items), ("user", "uid", config.users)):
        if table is not None:
            yield name, key, table


def _fields(config: EventsConfig, table: Snapshots) -> list[Field]:
    fields = [Field("id", table.id, "id")]
    if table.valid_from is not None:
        fields.append(Field("valid_from", table.valid_from, "time"))
    if table is config.items and config.available_from is not None:
        fields.append(Field("available_from", config.available_from, "time"))
    for name, feature in table.columns.items():
        fields.append(Field(f"f_{name}", name, KINDS[feature.kind]))
    for column, content in table.content.items() if isinstance(table, ItemTable) else ():
        form = "words" if content.kind == "text" else "any"
        form = form if content.path_column is None else "text"
        fields.append(Field(f"t_{column}", content.path_column or column, form))
    return fields


def _check_types(file: str, table: Snapshots, schema: pa.Schema, kind: pa.DataType) -> None:
    """Raise a ValueError for a column of an unfit type, or ids of another type than `kind`."""
    if (id_kind := schema.field("id").type) != kind:
        raise ValueError(
            f"{file}: column '{table.id}' has type {id_kind}, but {kind} in the events; write one "
            "type"
        )
    for column, feature in table.columns.items():
        settle_fill(column, feature, schema.field(f"f_{column}").type)
    for column, content in table.content.items() if isinstance(table, ItemTable) else ():
        if content.path_column is None:
            _check_content(file, column, content, schema.field(f"t_{column}").type)


def _check_content(file: str, name: str, content: Content, kind: pa.DataType) -> None:
    value = kind.value_type if is_list(kind) else kind
    number = value.value_type if is_list(value) else value
    is_bytes = pa.types.is_binary(value) or pa.types.is_large_binary(value)
    is_number = pa.types.is_floating(number) or (number == kind and pa.types.is_integer(kind))
    is_id = is_id_type(value) or pa.types.is_null(value)
    fits, expected = {
        "text": (is_text(kind), "string"),
        "image": (is_bytes, "binary, or path_column"),
        "feature": (is_number, "a number, list<float> or list<list<float>>"),
        "category": (is_id, "integer or string, or a list of them"),
        "other": (True, "anything"),
    }[content.kind]
    if not fits:
        raise ValueError(
            f"{file}: column '{name}' has type {kind}, expected {expected}; write it so"
        )


def _check_unique(engine: SqlEngine, name: str, table: Snapshots, file: str) -> None:
    rows = f"SELECT id FROM {name}_snapshots GROUP BY id, valid_from HAVING count(*) > 1"
    repeated = engine.value("min(id)", f"({rows})")
    if repeated is not None:
        fix = " of one time; keep one" if table.valid_from else "; keep one, or set valid_from"
        raise ValueError(f"{file}: column '{table.id}': {repeated} has several rows{fix}")


def with_columns(
    source: str, table: str, key: str, features: Mapping[str, Feature], prefix: str
) -> str:
    """Return SQL that adds features of the snapshot that was valid at each row's time.

    `source` is SQL of rows with `ts` and the id column `key`; `prefix` starts new columns' names.
    """
    columns = {
        f"{prefix}{name}": filled(f"t.{quoted(f'f_{name}')}", feature.fill)
        for name, feature in features.items()
    }
    return (
        f"SELECT s.*, {aligned(columns, columns)} FROM ({source}) s LEFT JOIN {table}_snapshots t "
        f"ON s.{key} = t.id AND s.ts >= t.valid_from AND s.ts < t.valid_until"
    )


def add_features(
    engine: SqlEngine, config: EventsConfig, source: str, may_be_empty: bool = False
) -> dict[str, int]:
    """Make the stage `samples`: `source` with item and user features; return rows left out."""
    query = f"SELECT * FROM {source}"
    required: dict[str, str] = {}
    for name, key, table in snapshot_tables(config):
        if table.columns:
            query = with_columns(query, name, key, table.columns, "c_")
            required |= required_features(config, list(table.columns))
    if not required:
        engine.view("samples", query)
        return {}
    engine.add("enriched", query)
    is_complete, reasons = complete_rows(engine, "enriched", required)
    engine.view("samples", f"SELECT * FROM enriched WHERE {is_complete}")
    if not may_be_empty and not engine.count_rows("samples"):
        raise ValueError(f"rows: none is left; {reasons} were left out; correct these columns")
    return reasons


PICTURES_PER_GROUP = 128  # pictures in memory at once
READERS = 16  # threads that read pictures, which mostly wait for URLs


def _named_pictures(items: ItemTable) -> dict[str, Content]:
    """Return the content columns whose pictures are files that a column names."""
    return {name: c for name, c in items.content.items() if c.path_column is not None}


def _check_pictures(engine: SqlEngine, items: ItemTable) -> None:
    """Raise a ValueError if a column's first picture is no image, or a local file is missing."""
    for name, content in _named_pictures(items).items():
        path = quoted(f"t_{name}")
        rows = f"SELECT DISTINCT id, {path} AS path FROM item_snapshots WHERE {path} <> ''"
        ids, paths = engine.table(f"{rows} ORDER BY 1, 2").columns
        for number, (item, path) in enumerate(zip(ids.to_pylist(), paths.to_pylist())):
            file = _location(content, path)
            if number == 0:
                where = f"{file}: the picture of item {item}"
                check_first_image([(pa.array([_read(content, item, path)]), where)])
            elif file.is_local and not file.exists():
                raise ValueError(_missing(file, content, item))


def add_pictures(folder: Path, items: ItemTable, id_column: str) -> None:
    """Replace paths by the bytes of their files in the items' Parquet files."""
    contents = _named_pictures(items)
    if not contents:
        return
    for file in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(file) as source, atomic_file(file) as new_file:
            schema = source.schema_arrow
            for name in contents:
                schema = schema.set(schema.get_field_index(name), pa.field(name, pa.binary()))
            options = {"compression": "zstd", "write_page_checksum": True}
            with (
                pq.ParquetWriter(new_file, schema, **options) as writer,
                ThreadPoolExecutor(READERS) as readers,
            ):
                for batch in source.iter_batches(PICTURES_PER_GROUP):
                    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                    ids = columns[id_column].to_pylist()
                    for name, content in contents.items():
                        paths = columns[name].to_pylist()
                        pictures = readers.map(partial(_read, content), ids, paths)
                        columns[name] = pa.array(list(pictures), pa.binary())
                    writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))


def _read(content: Content, item: object, path: str | None) -> bytes | None:
    """Return the bytes of an item's picture, None without a path."""
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
