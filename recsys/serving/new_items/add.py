"""Adds items to a package, or replaces the content of items that it has, without training.

What is written is small: the vectors of added items, in a folder of its own, and the manifest. The
manifest is replaced last, by one rename, so that a process that is killed leaves the package as it
was, and one that serves goes on with the files it has.

Shapes: K items that are new or changed, N items of the files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from recsys.checkpoint.run_schema import load_run_schema
from recsys.data.filesystem import Location
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
from recsys.storage.manifest import describe_all, differences

logger = logging.getLogger(__name__)

LOCK = ".lock"


@dataclass(frozen=True)
class AddedCounts:
    """Numbers of items of an addition."""

    new: int  # they had no content in the package
    changed: int  # their content was replaced
    unchanged: int
    without_row: int  # new ones with the ID vector of unknown ids, as the table is full

    def __str__(self) -> str:
        """Describe the counts in a line."""
        full = f" ({self.without_row:,} by content alone, the ID table is full)"
        return (
            f"{self.new:,} items added{full if self.without_row else ''}, "
            f"{self.changed:,} changed, {self.unchanged:,} unchanged"
        )


def add_items(package: Path, items: str) -> AddedCounts:
    """Encode new and changed items of Parquet files and put them into a package, all or none.

    Args:
        package: the folder; it may be in use by servers.
        items: Parquet file, or folder of them, with the columns of the dataset's `items/`. Files of
            features that `schema.yaml` names are read from the folder that holds it.

    Raises:
        ValueError: a value cannot be used (it names file, column and row), an encoder is not that
            of the run, or the package has no content or is damaged. Nothing is written then.
    """
    read_manifest(package, verify=False)
    with _locked(package), TemporaryDirectory() as cache:
        manifest = read_manifest(package, verify=False)
        _require_encoder(package, manifest)
        added = AddedItems.open(package, manifest.added)
        table, ids = _open_items(package, added, Location.of(items))
        encoder = ItemEncoder(package, manifest.entry_shapes)
        store = encoder.read(table, Path(cache))
        index = content_index(store)
        known = np.load(package / ENCODER / INDEX, allow_pickle=False)
        is_new, is_changed = _compare(index, known, added.index, table)
        counts = AddedCounts(
            int(is_new.sum()),
            int(is_changed.sum()),
            int((~is_new & ~is_changed).sum()),
            int((index["item"][is_new] >= table.schema.num_items).sum()),
        )
        if counts.new or counts.changed:
            chosen = index[is_new | is_changed]
            vectors = encoder.encode(store, chosen["item"])
            _write(package, manifest, added, *added.merged_with(chosen, vectors), ids)
    return counts


@contextmanager
def _locked(package: Path) -> Iterator[None]:
    """Let one process at a time add items; others wait for it.

    Raises:
        ValueError: the package cannot be written to.
    """
    lock = FileLock(package / LOCK)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("%s: another process adds items; waiting for it", package)
            lock.acquire()
    except OSError as error:
        raise ValueError(f"{package}: cannot be written to ({error}); change its rights") from error
    try:
        yield
    finally:
        lock.release()


def _require_encoder(package: Path, manifest: Manifest) -> None:
    """Require a package with content, whose files besides tables and graph are whole."""
    if not manifest.entry_shapes:
        raise ValueError(
            f"{package}: its model reads no content, so an item is known by its ID alone; ids that "
            "it does not know are scored as unknown, or train a model with `content`"
        )
    read = ("items/", "added/", "vocabulary/", "schema.yaml")
    files = {name: of for name, of in manifest.files.items() if name.startswith(read)}
    for difference in differences(package, files):
        raise ValueError(f"{difference}; export the run again, or copy the package again")


def _open_items(package: Path, added: AddedItems, files: Location) -> tuple[ItemTable, pa.Array]:
    """Return the items of files, and all raw ids that were added to the map of the run.

    Raises:
        ValueError: the files have no rows, an id is null, occurs twice or is of another type.
    """
    schema = load_run_schema(package)
    assert schema is not None
    known = schema.vocabularies.get(schema.target_item)
    vocabulary = grow_vocabulary(schema, [added.ids])
    num_items, ids = schema.num_items, added.ids
    if vocabulary is not None and known is not None:
        assert schema.items is not None
        name = schema.items.id
        for file in files.files(".parquet"):
            with open_parquet(file) as parquet:
                column_type(parquet, file, name)
                of_file = parquet.read(columns=[name]).column(0).combine_chunks()
            try:
                vocabulary.extend([plain_values(of_file).drop_null()])
            except ValueError as error:
                raise ValueError(f"{file}: column '{name}': {error}") from error
        num_items, ids = vocabulary.num_items, vocabulary.ids.slice(len(known))  # type: ignore[arg-type]
    root = Location(files.filesystem, files.path.rpartition("/")[0])
    return ItemTable(root, schema, "error", files, num_items), ids


def _compare(
    index: np.ndarray, known: np.ndarray, added: np.ndarray, table: ItemTable
) -> tuple[np.ndarray, np.ndarray]:  # bool [N] each
    """Return which items of an index are new, and of which the content has changed.

    Raises:
        ValueError: another item has the row of one of them, by its hash.
    """
    before = np.zeros(len(index), index.dtype)
    is_new = np.ones(len(index), bool)
    for stored in (known, added):
        place, has_item = lookup(stored, index["item"])
        before[has_item] = stored[place[has_item]]
        is_new &= ~has_item
    collides = ~is_new & (before["raw"] != index["raw"])
    if collides.any():
        row = table.rows[np.argsort(table.ids)][int(collides.argmax())]
        raise ValueError(
            f"{table.folder}: column '{table.items.id}', row {row}: another item of the package "
            "has this item's hash, and content is kept by hash; leave the item out, or train with "
            "a vocabulary of kind exact"
        )
    return is_new, ~is_new & (before["content"] != index["content"])


def _write(
    package: Path, manifest: Manifest, added: AddedItems, index: np.ndarray, vectors: Any, ids: Any
) -> None:
    """Write the files of the addition, then the manifest that names them."""
    of_content = VectorFileShape(**manifest.content["history"])
    shape = replace(of_content, num_rows=len(index))
    named = added.write_next(package, index, vectors, ids, shape)
    folder = package / FOLDER / str(named["number"])
    kept = {name: of for name, of in manifest.files.items() if not name.startswith(f"{FOLDER}/")}
    files = kept | describe_all(package, sorted(folder.iterdir()))
    replace_manifest(package, replace(manifest, added=named, files=files))
