"""Hashes of the content of single items, stored beside the array of a modality.

After an edit of the items, the array is a new one; the hashes show which items changed, so that
frozen caches and memory banks encode only these.

Shapes: N rows of an array, n rows to hash.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from recsys.data.filesystem import whole_file
from recsys.data.items.ragged_array import RaggedArray

HASHES = "hashes.npy"
HASH_TYPE = "S16"  # empty for an item without content
ROWS_PER_READ = 256


def row_hashes(array: RaggedArray, rows: np.ndarray) -> np.ndarray:  # rows [n] -> [n]
    """Return a hash of the content of each row."""
    hashes = np.zeros(len(rows), HASH_TYPE)
    for start in range(0, len(rows), ROWS_PER_READ):
        chunk = rows[start : start + ROWS_PER_READ]
        values, mask = array.gather(chunk)
        for place, (content, known) in enumerate(zip(values, mask, strict=True)):
            digest = hashlib.blake2b(content[known].tobytes(), digest_size=16).digest()
            hashes[start + place] = digest
    return hashes


def stored_hashes(folder: Path) -> np.ndarray:  # [N], memory-mapped
    """Return the hashes of all rows of the array in `folder`, computed at the first call."""
    path = folder / HASHES
    if not path.exists():
        array = RaggedArray(folder)
        rows = np.flatnonzero(array.lengths > 0)
        hashes = np.zeros(len(array), HASH_TYPE)
        hashes[rows] = row_hashes(array, rows)
        with whole_file(path) as partial, partial.open("wb") as file:
            np.save(file, hashes)
    return np.load(path, "r", allow_pickle=False)
