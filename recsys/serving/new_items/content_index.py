"""Index of the items of a package: whether an item's content has changed shows by its hash.

Shapes: N items with content.
"""

from __future__ import annotations

import numpy as np

from embeddings.vocabulary.fixed import HashVocabulary, integer_ids
from recsys.data.items.content_store import ContentStore
from recsys.data.items.item_table import ItemTable

# item: row of its content vector. content: a hash. raw: its raw id as an integer where a
# hash vocabulary may give several ids one row; else 0.
INDEX_TYPE = np.dtype([("item", "<i8"), ("content", "<u8"), ("raw", "<i8")])


def content_index(store: ContentStore) -> np.ndarray:  # INDEX_TYPE [N], by item
    """Return the index of a store's items."""
    items, hashes = store.item_hashes()
    index = np.zeros(len(items), INDEX_TYPE)
    index["item"], index["content"] = items, hashes
    table = store.items
    if isinstance(table.schema.vocabularies.get(table.schema.target_item), HashVocabulary):
        index["raw"] = _raw_ids(table)[table.rows[np.argsort(table.ids)]]
    return index


def _raw_ids(table: ItemTable) -> np.ndarray:  # int64, of all rows of the files; 0 for null
    found = []
    for _, _, chunk in table.chunks(table.items.id):
        of_chunk = np.zeros(len(chunk), np.int64)
        of_chunk[np.asarray(chunk.is_valid())] = integer_ids(chunk.drop_null())
        found.append(of_chunk)
    return np.concatenate(found)


def merged(before: np.ndarray, after: np.ndarray) -> np.ndarray:  # INDEX_TYPE, by item
    """Return the entries of both; those of `after` replace those of the same items."""
    kept = before[~np.isin(before["item"], after["item"])]
    both = np.concatenate([kept, after])
    return both[np.argsort(both["item"])]


def lookup(index: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [N]
    """Return the place of each item in an index, and whether it is in it."""
    if not len(index):
        return np.zeros(len(items), np.int64), np.zeros(len(items), bool)
    place = np.searchsorted(index["item"], items).clip(max=len(index) - 1)
    return place, index["item"][place] == items
