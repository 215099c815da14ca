"""Raw ids as rows of tables, or as integers where a map learns their rows in training.

Null is the unknown id: the last row of an exact or bounded map, an id of its own of a hash.

Shapes: N ids, H rows per id.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from embeddings.vocabulary.fixed import (
    NULL_ID,
    ExactVocabulary,
    HashVocabulary,
    integer_ids,
    mix64,
)


def plain_ids(ids: pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Return raw ids without dictionary, and masks [N] of null ids and of ids beyond int64."""
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    too_large = np.zeros(len(ids), bool)
    if pa.types.is_uint64(ids.type):
        too_large = ids.fill_null(0).to_numpy(zero_copy_only=False) > np.iinfo(np.int64).max
    return ids, ids.is_null().to_numpy(False), too_large


def rows_of_ids(
    ids: pa.Array,
    null: np.ndarray,
    too_large: np.ndarray,
    vocabulary: ExactVocabulary | HashVocabulary | None,
) -> np.ndarray:  # ids, null, too_large [N] -> int64 [N] or [N, H]
    """Return rows of raw ids, or the ids as integers if `vocabulary` is None.

    Null becomes the unknown id; ids that are too large become zeros.
    """
    rows_of = integer_ids if vocabulary is None else vocabulary.rows_of
    usable = ~(null | too_large)
    if usable.all():
        return rows_of(ids)
    of_usable = rows_of(ids.filter(pa.array(usable)))
    rows = np.zeros((len(ids), *of_usable.shape[1:]), np.int64)
    rows[usable] = of_usable
    if isinstance(vocabulary, ExactVocabulary):
        rows[null] = vocabulary.unknown_row
    else:
        rows[null] = rows_of(pa.array([NULL_ID]))[0]
    return rows


def raw_groups(ids: pa.Array, positions: np.ndarray) -> np.ndarray:  # [N], [N] -> int64 [N]
    """Return raw ids of the group as integers; a row without one is a group of its own."""
    ids, null, too_large = plain_ids(ids)
    groups = rows_of_ids(ids, null, too_large, None)
    return np.where(null, mix64(positions).view(np.int64), groups)
