"""Vectors of all items of a run, with their raw ids: content vectors, or those of an item tower.

Shapes: I items, D content dimension, V width of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job
from recsys.data.items.item_table import ItemTable
from recsys.distributed.lockstep import Lockstep
from recsys.evaluation.retrieval import catalogue_of, catalogue_vectors
from recsys.serving.export import ITEMS_PER_CALL, encoded

VectorKind = Literal["content", "item_tower"]


@dataclass(frozen=True)
class ItemVectors:
    """Vectors of the same items: rows of the item's table, raw ids and vectors, by place."""

    rows: np.ndarray  # int64 [I], rising
    ids: pa.Array  # int64 or string [I]
    vectors: np.ndarray  # float32 [I, V]


def item_vectors(job: Job, kind: VectorKind) -> ItemVectors:
    """Compute the vectors of the items that `recsys evaluate` ranks. A collective.

    Args:
        job: a job of one process with the best model of a run.
        kind: content: content vectors, as the model encodes ranked items; item_tower: those of a
            two-tower model.

    Raises:
        ValueError: the run has no content, or raw ids are not known.
    """
    ids = raw_ids(job)
    if kind == "item_tower":
        items, vectors = catalogue_vectors(job, Lockstep(job.ranks))
        return ItemVectors(items.numpy(), ids, vectors.float().numpy())
    rows = np.asarray(catalogue_of(job))
    return ItemVectors(rows, ids, content_vectors(job, rows))


def content_vectors(job: Job, rows: np.ndarray) -> np.ndarray:  # int64 [I] -> float32 [I, D]
    """Encode the content of items, as the model does for ranked items.

    The memory bank may still have vectors of earlier steps, of unseen items those of the first.

    Raises:
        ValueError: the run has no content.
    """
    branch, store = job.em3.content, job.store
    if branch is None or store is None:
        raise ValueError(
            "the run has no content (its setting is `content: none`); give a run with content, or "
            "one of two_tower with --vectors item_tower"
        )
    starts = range(0, len(rows), ITEMS_PER_CALL)
    blocks = (encoded(branch, store, rows[start : start + ITEMS_PER_CALL]) for start in starts)
    return np.concatenate([block[:, : branch.dim].float().numpy() for block in blocks])


def raw_ids(job: Job) -> pa.Array:
    """Return the raw ids of the items that `recsys evaluate` ranks, in its order.

    Raises:
        ValueError: they are hashed, and no files of the items have them.
    """
    schema = job.schema
    if schema.items is not None:
        store = job.store
        table = store.items if store else ItemTable(job.root, schema, job.config.on_bad_row)
        chunks = [_plain(chunk) for _, _, chunk in table.chunks(schema.items.id)]
        return pa.concat_arrays(chunks).take(pa.array(table.rows[np.argsort(table.ids)]))
    vocabulary = schema.vocabularies.get(schema.target_item)
    if vocabulary is None:
        return pa.array(np.arange(schema.num_items))
    if isinstance(vocabulary, ExactVocabulary):
        return _plain(vocabulary.ids)
    raise ValueError(
        f"{job.root}/schema.yaml: ids of '{schema.target_item}' are hashed, so that vectors cannot "
        "be named; write the items to items/*.parquet and describe them under `items`"
    )


def _plain(ids: pa.Array) -> pa.Array:
    """Return ids as int64 or strings."""
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    return ids.cast(pa.int64() if pa.types.is_integer(ids.type) else pa.string())
