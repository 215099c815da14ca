"""Adds items to a package, or replaces the content of items that it has, without training.

Vectors go into a new folder; the manifest is replaced last, by one rename. A killed process leaves
the package unchanged. Shapes: K items that are new or changed, N items of the files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
from filelock import FileLock
from torch import Tensor

from recsys.checkpoint.run_schema import load_run_schema
from recsys.data.items.item_table import ItemTable, plain_values
from recsys.data.parquet.file import column_type, open_parquet
from recsys.serving.new_items.added_items import (
    FOLDER,
    AddedItems,
    content_index,
    grow_vocabulary,
    lookup,
)
from recsys.serving.new_items.item_encoder import FOLDER as ENCODER
from recsys.serving.new_items.item_encoder import INDEX, ItemEncoder
from recsys.serving.package import Manifest, read_manifest, replace_manifest
from recsys.serving.vector_file import VectorFileShape
from recsys.storage.location import Location
from recsys.storage.manifest import describe_all, differences


@dataclass(frozen=True)
class AddedCounts:
    """Numbers of items of an addition."""

    new: int  # they had no content in the package
    changed: int  # their content was replaced
    unchanged: int
    without_row: int  # new ones with the ID vector of unknown ids, as the table is full

    def __str__(self) -> str:
        full = f" ({self.without_row:,} by content alone, the ID table is full)"
        return (
            f"{self.new:,} items added{full if self.without_row else ''}, "
            f"{self.changed:,} changed, {self.unchanged:,} unchanged"
        )


def add_items(package: Path, items: str) -> AddedCounts:
    """Encode new and changed items of Parquet files and put them into a package, all or none.

    The package may be in use by servers. `items` is a file or folder with the columns of `items/`.

    Raises:
        ValueError: a value cannot be used (it names file, column and row), an encoder is not that
            of the run, or the package has no content or is damaged. Nothing is written then.
    """
    read_manifest(package, verify=False)
    # Processes that add items at once wait for each other.
    with FileLock(package / ".lock"), TemporaryDirectory() as cache:
        manifest = read_manifest(package, verify=False)
        _require_encoder(package, manifest)
        previous = AddedItems.open(package, manifest.added)
        table, ids = _open_items(package, previous, Location.of(items))
        encoder = ItemEncoder(package, manifest.entry_shapes)
        store = encoder.read(table, Path(cache))
        index = content_index(store)
        exported = np.load(package / ENCODER / INDEX, allow_pickle=False)
        is_new, is_changed = _compare(index, exported, previous.index, table)
        counts = AddedCounts(
            int(is_new.sum()),
            int(is_changed.sum()),
            int((~is_new & ~is_changed).sum()),
            int((index["item"][is_new] >= table.schema.num_items).sum()),
        )
        if counts.new or counts.changed:
            to_encode = index[is_new | is_changed]
            vectors = encoder.encode(store, to_encode["item"])
            _write(package, manifest, previous, *previous.merged_with(to_encode, vectors), ids)
    return counts


def _require_encoder(package: Path, manifest: Manifest) -> None:
    if not manifest.entry_shapes:
        raise ValueError(
            f"{package}: its model reads no content, so an item is known by its ID alone; ids that "
            "it does not know are scored as unknown, or train a model with `content`"
        )
    prefixes = ("items/", "added/", "vocabulary/", "schema.yaml")
    files = {name: file for name, file in manifest.files.items() if name.startswith(prefixes)}
    for difference in differences(package, files):
        raise ValueError(f"{difference}; export the run again, or copy the package again")


def _open_items(package: Path, previous: AddedItems, files: Location) -> tuple[ItemTable, pa.Array]:
    """Return the items of files, and all raw ids that were added to the map of the run."""
    schema = load_run_schema(package)
    assert schema is not None
    exported = schema.vocabularies.get(schema.target_item)
    vocabulary = grow_vocabulary(schema, [previous.ids])
    num_items, ids = schema.num_items, previous.ids
    if vocabulary is not None and exported is not None:
        assert schema.items is not None
        name = schema.items.id
        for file in files.files(".parquet"):
            with open_parquet(file) as parquet:
                column_type(parquet, file, name)
                column = parquet.read(columns=[name]).column(0).combine_chunks()
            try:
                vocabulary.extend([plain_values(column).drop_null()])
            except ValueError as error:
                raise ValueError(f"{file}: column '{name}': {error}") from error
        num_items = vocabulary.num_items
        ids = vocabulary.ids.slice(len(exported))  # type: ignore[arg-type]
    root = Location(files.filesystem, files.path.rpartition("/")[0])
    return ItemTable(root, schema, "error", files, num_items), ids


def _compare(
    index: np.ndarray, exported: np.ndarray, previous: np.ndarray, table: ItemTable
) -> tuple[np.ndarray, np.ndarray]:  # bool [N] each
    stored = np.zeros(len(index), index.dtype)
    is_new = np.ones(len(index), bool)
    for part in (exported, previous):
        place, has_item = lookup(part, index["item"])
        stored[has_item] = part[place[has_item]]
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


def _write(
    package: Path,
    manifest: Manifest,
    previous: AddedItems,
    index: np.ndarray,
    vectors: Tensor,
    ids: pa.Array,
) -> None:
    shape = replace(VectorFileShape(**manifest.content["history"]), num_rows=len(index))
    entry = previous.write_next(package, index, vectors, ids, shape)
    folder = package / FOLDER / str(entry["number"])
    files = {
        name: file for name, file in manifest.files.items() if not name.startswith(f"{FOLDER}/")
    } | describe_all(package, sorted(folder.iterdir()))
    replace_manifest(package, replace(manifest, added=entry, files=files))
