"""Adds items to a package, or replaces the content of items that it has, without training.

Vectors go into a new folder; the manifest is replaced last, by one rename. A killed process leaves
the package unchanged. A server writes items of requests to a file, and keeps the encoder loaded.
Shapes: K items that are new or changed, N items of the files.
"""

import base64
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from torch import Tensor

from recsys.checkpoint.run_schema import load_run_schema
from recsys.data.items.item_table import ItemTable, plain_values
from recsys.data.parquet.file import column_type, open_parquet
from recsys.data.parquet.values import is_list, usable_column
from recsys.data.schema import Schema
from recsys.data.schema_columns import FeatureTable, ItemColumn
from recsys.data.transforms.columns import check_types, read_columns
from recsys.serving.features.package_features import PackageFeatures, updated_rows
from recsys.serving.features.source import value_columns
from recsys.serving.new_items.added_items import AddedItems, content_index, grow_vocabulary, lookup
from recsys.serving.new_items.item_encoder import FOLDER as ENCODER
from recsys.serving.new_items.item_encoder import INDEX, EncoderCache, ItemEncoder
from recsys.serving.package import MANIFEST, Manifest, read_manifest
from recsys.storage.location import Location, errors_at
from recsys.storage.manifest import VerifiedFiles, differences, write_signed


@dataclass(frozen=True)
class AddedCounts:
    """Numbers of items of an addition."""

    new: int = 0  # they had no content in the package
    changed: int = 0  # their content was replaced
    unchanged: int = 0
    without_row: int = 0  # new ones with the ID vector of unknown ids, as the table is full
    features: int = 0  # items whose features are new or were replaced

    def __str__(self) -> str:
        full = f" ({self.without_row:,} by content alone, the ID table is full)"
        features = f"; features of {self.features:,} items" if self.features else ""
        return (
            f"{self.new:,} items added{full if self.without_row else ''}, "
            f"{self.changed:,} changed, {self.unchanged:,} unchanged{features}"
        )


def add_items(package: Path, items: str, encoders: EncoderCache | None = None) -> AddedCounts:
    """Put new and changed items of Parquet files into a package, all or none.

    The package may be in use by servers. `items` is a file or folder with the columns of `items/`,
    whose content is encoded, and features of the items; a column that it lacks does not change.
    `encoders` has the encoder of earlier calls.

    Raises:
        ValueError: a value cannot be used (it names file, column and row), an encoder is not that
            of the run, or the package has no content or is damaged. Nothing is written then.
    """
    encoders = encoders or EncoderCache()
    package = package.resolve()  # a link may be replaced meanwhile
    read_manifest(package, verify=False)
    # Processes that add items at once wait for each other.
    with FileLock(package / ".lock"):
        manifest = read_manifest(package, verify=False)
        schema = load_run_schema(package)
        table = next((entry for entry in schema.features if entry.by == [schema.target_item]), None)
        _require_addable(package, manifest, table, encoders.verified)
        previous, files = AddedItems.open(package, manifest.added), Location.of(items)
        num_features, features = 0, previous.features
        if table is not None:
            rows = _changed_features(package, schema, table, previous, files)
            if num_features := len(rows):
                features = previous.with_features(rows, schema.target_item)
        counts, ids = AddedCounts(), previous.ids
        index, vectors = previous.index[:0], torch.zeros(0, 0)
        reads_features = table is not None and _has_one_of(value_columns(table), files)
        if manifest.entry_shapes and (
            not reads_features or _has_one_of(_content_columns(schema), files)
        ):
            encoder = encoders.of_package(package, manifest)
            counts, index, vectors, ids = _new_content(package, schema, encoder, previous, files)
        if len(index) or num_features:
            content = previous.merged_with(index, vectors)
            manifest = previous.write_next(package, manifest, *content, ids, features)
            write_signed(package / MANIFEST, asdict(manifest))
    return replace(counts, features=num_features)


def _has_one_of(columns: Iterable[str], files: Location) -> bool:
    names = set(columns)
    for file in files.files(".parquet"):
        with open_parquet(file) as parquet:
            if names & set(parquet.schema_arrow.names):
                return True
    return False


def _content_columns(schema: Schema) -> dict[str, ItemColumn]:
    """Return the columns that may be encoded; a category is not, but may be a feature."""
    columns = {} if schema.items is None else schema.items.columns
    return {name: column for name, column in columns.items() if column.kind != "category"}


def _require_addable(
    package: Path, manifest: Manifest, table: FeatureTable | None, verified: VerifiedFiles
) -> None:
    if not manifest.entry_shapes and table is None:
        raise ValueError(
            f"{package}: its model reads no content, so an item is known by its ID alone; ids that "
            "it does not know are scored as unknown, or train a model with `content`"
        )
    prefixes = ("items/", "added/", "features/", "vocabulary/", "schema.yaml")
    files = {name: file for name, file in manifest.files.items() if name.startswith(prefixes)}
    for difference in differences(package, files, verified=verified):
        raise ValueError(f"{difference}; export the run again, or copy the package again")


def _changed_features(
    package: Path, schema: Schema, table: FeatureTable, previous: AddedItems, files: Location
) -> pa.Table:
    """Return the features of the items of files whose features are new or change."""
    features, unix_time = PackageFeatures(package, schema, previous.features), time.time()
    item = schema.target_item if schema.items is None else schema.items.id
    tables, changes = [], []
    for file in files.files(".parquet"):
        with open_parquet(file) as parquet:
            column_type(parquet, file, item)
            names = [name for name in value_columns(table) if name in parquet.schema_arrow.names]
            rows = parquet.read(columns=[item, *names]).rename_columns([schema.target_item, *names])
        if (ids := rows[schema.target_item]).null_count:
            row = pc.index(ids.is_null(), True).as_py()
            raise ValueError(f"{file}: column '{item}', row {row}: null; every item needs an id")
        try:
            updated, is_changed = updated_rows(features, table, rows, unix_time)
        except (ValueError, pa.ArrowException) as error:
            raise ValueError(f"{file}: {error}; write ids and features as for training") from error
        _check_values(schema, table, updated, str(file))
        tables.append(updated)
        changes.append(is_changed)
    if not tables:
        raise ValueError(f"{files}: no such Parquet file, nor a folder with *.parquet files")
    rows = pa.concat_tables(tables, promote_options="permissive")  # ids of any width
    if pc.count_distinct(rows[schema.target_item]).as_py() < len(rows):
        raise ValueError(f"{files}: column '{item}': an item has several rows; keep one")
    return rows.filter(pa.chunked_array(changes))


def _check_values(schema: Schema, table: FeatureTable, rows: pa.Table, location: str) -> None:
    """Require values that the model's columns can be made of, where these features suffice."""

    def refuse(name: str, bad: np.ndarray, reason: str, message: Callable[[int], str]) -> None:
        if bad.any():
            row = int(bad.argmax())
            item = rows[schema.target_item][row].as_py()
            raise ValueError(f"{location}: column '{name}', item '{item}': {message(row)}")

    for name in schema.columns:
        sources = schema.file_columns([name])
        if set(sources) <= set(table.columns):
            kinds = {source: rows[source].type for source in sources}
            check_types(schema, [name], kinds.__getitem__, location)
            usable_column(read_columns(rows, schema, [name], location), name, schema, refuse)


def _new_content(
    package: Path, schema: Schema, encoder: ItemEncoder, previous: AddedItems, files: Location
) -> tuple[AddedCounts, np.ndarray, Tensor, pa.Array]:  # index [K], [K, E], raw ids
    """Encode the items whose content is new or changes; return all raw ids that were added, too."""
    with TemporaryDirectory() as cache:
        table, ids = _open_items(schema, previous, files)
        store = encoder.read(table, Path(cache))
        index = content_index(store)
        exported = np.load(package / ENCODER / INDEX, allow_pickle=False)
        is_new, is_changed = _compare(index, exported, previous.index, table)
        counts = AddedCounts(
            new=int(is_new.sum()),
            changed=int(is_changed.sum()),
            unchanged=int((~is_new & ~is_changed).sum()),
            without_row=int((index["item"][is_new] >= table.schema.num_items).sum()),
        )
        to_encode = index[is_new | is_changed]
        vectors = encoder.encode(store, to_encode["item"]) if len(to_encode) else torch.zeros(0, 0)
    return counts, to_encode, vectors, ids


def _open_items(
    schema: Schema, previous: AddedItems, files: Location
) -> tuple[ItemTable, pa.Array]:
    """Return the items of files, and all raw ids that were added to the map of the run."""
    vocabulary = grow_vocabulary(schema, [previous.ids])
    num_items, ids = schema.num_items, previous.ids
    if vocabulary is not None:
        assert schema.items is not None
        name = schema.items.id
        for file in files.files(".parquet"):
            with open_parquet(file) as parquet:
                column_type(parquet, file, name)
                column = parquet.read(columns=[name]).column(0).combine_chunks()
            with errors_at(f"{file}: column '{name}'"):
                vocabulary.extend([plain_values(column).drop_null()])
        num_items, ids = vocabulary.num_items, vocabulary.ids.slice(vocabulary.num_exported)
    root = Location(files.filesystem, files.path.rpartition("/")[0])
    return ItemTable(root, schema, "error", files, num_items), ids


def _compare(
    index: np.ndarray, exported: np.ndarray, previous: np.ndarray, table: ItemTable
) -> tuple[np.ndarray, np.ndarray]:  # bool [N] each
    stored = np.zeros(len(index), index.dtype)
    is_new = np.ones(len(index), bool)
    for source in (exported, previous):
        positions, has_item = lookup(source, index["item"])
        stored[has_item] = source[positions[has_item]]
        is_new &= ~has_item
    collides = ~is_new & (stored["raw"] != index["raw"])
    if collides.any():
        row = table.rows[np.argsort(table.ids)][int(collides.argmax())]
        raise ValueError(
            f"{table.folder}: column '{table.items.id}', row {row}: another item of the package "
            "has this item's hash, and content is kept by hash; leave the item out, or train with "
            "a vocabulary of kind exact"
        )
    return is_new, ~is_new & (stored["content"] != index["content"])


# Types of content columns in which all items of a request are null.
TYPES = {
    "text": pa.string(),
    "image": pa.binary(),
    "feature": pa.list_(pa.float32()),
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

    An item's content is replaced whole: missing columns are null. Features may be left out.
    """
    content, columns = _content_columns(schema), dict[str, pa.Array]()
    item = schema.target_item if schema.items is None else schema.items.id
    tables = [table for table in schema.features if table.by == [schema.target_item]]
    features = [name for table in tables for name in value_columns(table)]
    known = [item, *({} if schema.items is None else schema.items.columns), *features]
    names = dict.fromkeys([item, *(name for row in items for name in row)])
    if unknown := sorted(names.keys() - set(known)):
        raise ValueError(f"items: {unknown} are none of the columns {known}")
    for name in features:
        if len({name in row for row in items}) > 1:
            raise ValueError(
                f"items: some have '{name}' and others none, which would stay as it is; send these "
                "separately, or give null"
            )
    have_content = {bool(content.keys() & row.keys()) for row in items}
    if len(have_content) > 1:
        raise ValueError("items: some have content and others none; send these separately")
    if have_content == {True}:
        names |= {name: None for name, column in content.items() if column.kind in TYPES}
    for name in names:
        kind = content[name].kind if name in content else None
        values = [row.get(name) for row in items]
        with errors_at(f"items: column '{name}'", pa.ArrowException, OverflowError, TypeError):
            if kind == "image":
                values = [_decoded(row.get(name), row.get(item)) for row in items]
            array = pa.array(values)
            if pa.types.is_null(array.type) and kind in TYPES:
                array = array.cast(TYPES[kind])
            elif kind == "image" and array.type == pa.list_(pa.null()):  # lists without an image
                array = array.cast(pa.list_(pa.binary()))
            columns[name] = array.cast(_with_floats(array.type)) if kind == "feature" else array
    return pa.table(columns)


def _with_floats(kind: pa.DataType) -> pa.DataType:
    """Return the type with floats for integers: many programs write 1.0 as 1 in JSON."""
    if is_list(kind):
        return pa.list_(_with_floats(kind.value_type))
    return pa.float64() if pa.types.is_integer(kind) or pa.types.is_null(kind) else kind


def _decoded(value: Any, item: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(element, item) for element in value]
    try:
        return None if value is None else base64.b64decode(value, validate=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"item '{item}': {error}; give the bytes of an image in base64") from error
