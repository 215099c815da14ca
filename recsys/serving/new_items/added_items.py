"""Items that were added to a package since its export, or changed: a folder per addition.

`added/NUMBER/` holds all additions: `index.npy` with a hash of each item's content, content
vectors, and raw ids that the run's exact map lacks. The manifest names the folder.
Shapes: K items added, N looked up, E width of content vectors.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from embeddings.vocabulary.fixed import ExactVocabulary, HashVocabulary, integer_ids
from recsys.data.items.content_store import ContentStore
from recsys.data.items.item_table import ItemTable
from recsys.data.schema import Schema
from recsys.serving.package import Manifest
from recsys.serving.vector_file import VectorFile, VectorFileShape, write_vectors
from recsys.storage.files import atomic_folder, flush
from recsys.storage.manifest import describe_all

FOLDER = "added"
INDEX, VECTORS, IDS = "index.npy", "content.vectors", "ids.parquet"
FEATURES = "features.parquet"
# item: row of the content vector. content: a hash. raw: raw integer id of a hash vocabulary, or 0.
INDEX_TYPE = np.dtype([("item", "<i8"), ("content", "<u8"), ("raw", "<i8")])


@dataclass(frozen=True)
class AddedItems:
    """Index and content vectors of items that a package got after its export."""

    number: int  # of additions so far
    index: np.ndarray  # INDEX_TYPE [K], by item
    ids: pa.Array  # raw ids that the run does not know, in the order of their rows
    vectors: VectorFile | None  # float32 [K, E] by position in the index; None if K = 0
    features: pa.Table | None = None  # rows of the features by item, in place of the export's

    @staticmethod
    def open(package: Path, entry: dict[str, Any]) -> AddedItems:
        """Open the items that a manifest's entry `added` names; none if it is empty."""
        if not entry:
            return AddedItems(0, np.zeros(0, INDEX_TYPE), pa.array([], pa.int64()), None)
        folder = package / FOLDER / str(entry["number"])
        index = np.load(folder / INDEX, allow_pickle=False)
        ids = pq.read_table(folder / IDS, partitioning=None)["id"].combine_chunks()
        vectors = features = None
        if entry["shape"]:
            vectors = VectorFile(folder / VECTORS, VectorFileShape(**entry["shape"]))
        if (folder / FEATURES).exists():
            features = pq.read_table(folder / FEATURES, partitioning=None)
        return AddedItems(entry["number"], index, ids, vectors, features)

    def with_features(self, rows: pa.Table, item: str) -> pa.Table:
        """Return these features and `rows`, which replace features of equal ids."""
        if self.features is None:
            return rows
        is_replaced = pc.is_in(self.features[item], rows[item])
        remaining = self.features.filter(pc.invert(is_replaced))
        return pa.concat_tables([remaining, rows], promote_options="permissive")  # ids of any width

    def replace_vectors(self, vectors: Tensor, items: np.ndarray) -> None:  # [N, E], [N]
        positions, is_added = lookup(self.index, items)
        if self.vectors is not None and is_added.any():
            vectors[torch.from_numpy(is_added)] = self.vectors.rows(positions[is_added])

    def merged_with(
        self, index: np.ndarray, vectors: Tensor
    ) -> tuple[np.ndarray, Tensor]:  # INDEX_TYPE, and as many vectors [E]
        """Return index and vectors of these items and of new ones, which replace equal items."""
        remaining = np.flatnonzero(~np.isin(self.index["item"], index["item"]))
        old = vectors[:0] if self.vectors is None else self.vectors.rows(remaining)
        new = vectors if len(index) else old[:0]  # without new items, vectors have no width
        union = np.concatenate([self.index[remaining], index])
        order = np.argsort(union["item"])
        return union[order], torch.cat([old, new])[torch.from_numpy(order)]

    def write_next(
        self,
        package: Path,
        manifest: Manifest,
        index: np.ndarray,  # INDEX_TYPE [K]
        vectors: Tensor,  # [K, E]
        ids: pa.Array,
        features: pa.Table | None = None,
    ) -> Manifest:
        """Write the folder of the next addition and return the manifest that names it.

        Older folders are removed; readers of the current manifest keep its folder.
        """
        root, number, shape = package / FOLDER, self.number + 1, None
        if len(index):
            shape = replace(VectorFileShape(**manifest.content["history"]), num_rows=len(index))
        for path in root.glob("*"):
            if path.name != str(self.number):
                shutil.rmtree(path)
        with atomic_folder(root / str(number)) as partial:
            np.save(partial / INDEX, index)
            pq.write_table(pa.table({"id": ids}), partial / IDS)
            if shape is not None:
                write_vectors(partial / VECTORS, shape, [vectors])
            if features is not None:
                pq.write_table(features, partial / FEATURES)
            for path in partial.iterdir():
                flush(path)
            flush(partial)
        flush(root)
        entry = {"number": number, "shape": None if shape is None else asdict(shape)}
        files = {
            name: file for name, file in manifest.files.items() if not name.startswith(f"{FOLDER}/")
        } | describe_all(package, sorted((root / str(number)).iterdir()))
        return replace(manifest, added=entry, files=files)


class GrowingVocabulary(ExactVocabulary):
    """An exact map that takes ids beyond its table; new ids get free rows of it first."""

    is_limited = False

    def __init__(self, vocabulary: ExactVocabulary, new_ids: Iterable[pa.Array] = ()) -> None:
        super().__init__(vocabulary.num_embeddings)
        self.num_exported = len(vocabulary)
        self.extend([vocabulary.ids, *new_ids])

    @property
    def num_items(self) -> int:
        """Number of rows of content: those of the table, and one per id beyond it."""
        return self.num_embeddings + max(0, len(self) - self.unknown_row)

    def find(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:  # int64 [N], -1: unknown
        rows = super().find(ids)
        return rows + (rows >= self.unknown_row)


def grow_vocabulary(schema: Schema, ids: list[pa.Array]) -> GrowingVocabulary | None:
    """Extend the schema's map of items by ids, and return it; None if it has no exact map."""
    vocabulary = schema.vocabularies.get(schema.target_item)
    if not isinstance(vocabulary, ExactVocabulary):
        return None
    grown = GrowingVocabulary(vocabulary, ids)
    schema.vocabularies[schema.target_item] = grown
    return grown


def content_index(store: ContentStore) -> np.ndarray:  # INDEX_TYPE, by item
    """Return the index of a store's items."""
    items, hashes = store.item_hashes()
    index = np.zeros(len(items), INDEX_TYPE)
    index["item"], index["content"] = items, hashes
    table = store.items
    if isinstance(table.schema.vocabularies.get(table.schema.target_item), HashVocabulary):
        index["raw"] = _raw_ids(table)[table.rows[np.argsort(table.ids)]]
    return index


def _raw_ids(table: ItemTable) -> np.ndarray:  # int64, of all rows of the files; 0 for null
    arrays = []
    for _, _, chunk in table.chunks(table.items.id):
        ids = np.zeros(len(chunk), np.int64)
        ids[np.asarray(chunk.is_valid())] = integer_ids(chunk.drop_null())
        arrays.append(ids)
    return np.concatenate(arrays)


def lookup(index: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [N]
    """Return the position of each item in an index, and whether it is in it."""
    if not len(index):
        return np.zeros(len(items), np.int64), np.zeros(len(items), bool)
    positions = np.searchsorted(index["item"], items).clip(max=len(index) - 1)
    return positions, index["item"][positions] == items
