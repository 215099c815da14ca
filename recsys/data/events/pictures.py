"""Pictures that the item table names by path: their bytes go into the items of the dataset."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.events.settings import Content, ItemTable
from recsys.data.events.sql import SqlEngine, quoted
from recsys.data.items.images import check_first_image
from recsys.storage.files import whole_file
from recsys.storage.location import Location

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
