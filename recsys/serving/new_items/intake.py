"""Items that a server takes by requests: as rows of a file, by the encoder that it keeps."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.checkpoint.run_schema import load_run_schema
from recsys.data.schema import Schema
from recsys.serving.features.source import value_columns
from recsys.serving.new_items.add import AddedCounts, add_items
from recsys.serving.new_items.item_encoder import EncoderCache
from recsys.serving.package import read_manifest

# Types of content of which no item of a request has any.
TYPES = {
    "text": pa.string(),
    "image": pa.binary(),
    "feature": pa.list_(pa.float32()),
    "category": pa.string(),
}

Item = Mapping[str, Any]


class ItemIntake:
    """Puts items of requests into the package at a path, which may be a link to one."""

    def __init__(self, package: Path) -> None:
        self._package, self._encoders = package, EncoderCache()

    def warm_up(self) -> None:
        """Load the encoders, if the package has some, so that the first item does not wait."""
        package = self._package.resolve()
        manifest = read_manifest(package, verify=False)
        if manifest.entry_shapes:
            self._encoders.of_package(package, manifest).load()

    def add(self, items: Sequence[Item]) -> AddedCounts:
        """Add items, as `add_items` does; a ValueError says what is wrong with one."""
        package = self._package.resolve()
        rows = item_rows(load_run_schema(package, with_vocabularies=False), items)
        with TemporaryDirectory() as folder:
            file = Path(folder, "items.parquet")
            pq.write_table(rows, file)
            try:
                return add_items(package, str(file), self._encoders)
            except ValueError as error:
                raise ValueError(str(error).replace(f"{file}", "items")) from error


def item_rows(schema: Schema, items: Sequence[Item]) -> pa.Table:
    """Return items as rows of a file; images are in base64.

    An item's content is given whole: what it lacks is null. Columns of features may be left out.
    """
    content = {} if schema.items is None else schema.items.columns
    item = schema.target_item if schema.items is None else schema.items.id
    tables = [table for table in schema.features if table.by == [schema.target_item]]
    features = [name for table in tables for name in value_columns(table)]
    names = dict.fromkeys([item, *(name for row in items for name in row)])
    if unknown := sorted(names.keys() - {item, *content, *features}):
        raise ValueError(f"items: {unknown} are none of the columns {[item, *content, *features]}")
    have_content = {bool(content.keys() & row.keys()) for row in items}
    if len(have_content) > 1:
        raise ValueError("items: some have content and others none; send these separately")
    if have_content == {True}:
        names |= {name: None for name, column in content.items() if column.kind in TYPES}
    columns = {}
    for name in names:
        kind = content[name].kind if name in content else None
        values = [row.get(name) for row in items]
        try:
            if kind == "image":
                values = [_decoded(value) for value in values]
            array = pa.array(values)
            if pa.types.is_null(array.type) and kind in TYPES:
                array = array.cast(TYPES[kind])
        except (pa.ArrowException, OverflowError, TypeError, binascii.Error) as error:
            raise ValueError(f"items: column '{name}': {error}") from error
        columns[name] = array
    return pa.table(columns)


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(part) for part in value]
    return None if value is None else base64.b64decode(value, validate=True)
