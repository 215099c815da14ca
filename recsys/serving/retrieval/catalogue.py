"""Vectors and raw ids of all items of a run that `recsys evaluate` ranks.

Shapes: I items, V width of a vector.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job
from recsys.data.items.item_table import ItemTable
from recsys.distributed.lockstep import Lockstep
from recsys.evaluation.retrieval import catalogue_of, catalogue_vectors
from recsys.ranking.generative import Generative
from recsys.serving.new_items.item_encoder import encoded_blocks

VectorKind = Literal["content", "item_tower", "codes"]


@dataclass(frozen=True)
class ItemVectors:
    """Vectors of the same items: rows of the item's table, raw ids and vectors, by position."""

    rows: np.ndarray  # int64 [I], ascending
    ids: pa.Array  # int64 or string [I]
    vectors: np.ndarray  # float32 [I, V]; int64 [I, L + 2] of codes


def unit(vectors: np.ndarray) -> np.ndarray:  # [I, V] -> [I, V]
    """Return the vectors with length one; a vector of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)


def item_vectors(job: Job, kind: VectorKind) -> ItemVectors:
    """Compute the vectors of the items that `recsys evaluate` ranks. A collective.

    A run without content, or with ids of which only hashes are known, is a ValueError.
    """
    ids = raw_ids(job)
    if kind == "codes":
        assert isinstance(job.em3.ranking, Generative)
        rows = np.asarray(catalogue_of(job))
        codes = job.em3.ranking.table.numpy()[rows]
        has_codes = codes[:, -1] > 0
        return ItemVectors(rows[has_codes], ids.filter(pa.array(has_codes)), codes[has_codes])
    if kind == "item_tower":
        items, vectors = catalogue_vectors(job, Lockstep(job.ranks))
        return ItemVectors(items.numpy(), ids, vectors.float().numpy())
    branch, store, rows = job.em3.content, job.store, np.asarray(catalogue_of(job))
    if branch is None or store is None:
        raise ValueError(
            "the run has no content (its setting is `content: none`); give a run with content, or "
            "one of two_tower with --vectors item_tower"
        )
    blocks = [
        block[:, : branch.dim].float().numpy() for block in encoded_blocks(branch, store, rows)
    ]
    return ItemVectors(rows, ids, np.concatenate(blocks))


def item_table(job: Job) -> ItemTable:
    """Return the table of a job's items, which the job has already read if there is content."""
    store = job.store
    return store.items if store else ItemTable(job.root, job.schema, job.config.on_bad_row)


def raw_ids(job: Job) -> pa.Array:
    """Return the raw ids of the items that `recsys evaluate` ranks; ValueError: they are hashed."""
    schema = job.schema
    if schema.items is not None:
        table = item_table(job)
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
    return ids.cast(pa.int64() if pa.types.is_integer(ids.type) else pa.string())
