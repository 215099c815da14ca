"""A folder of item vectors: what `recsys export-vectors` writes and `recsys retrieve` reads.

`vectors.npy` has the vectors, `items.parquet` the raw id (`id`) and table row (`row`) of each, in
the same order; `index.faiss` is the index, whose positions are these places; `manifest.json` lists
the files with their sizes and hashes. `queries/` is the package of the user tower, with a manifest
of its own, as items may be added to it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.build import Job
from recsys.data.filesystem import whole_folder
from recsys.distributed.ranks import Ranks
from recsys.ranking.two_tower import TwoTower
from recsys.serving.export import load_for_export
from recsys.serving.package import GRAPH, BaseManifest, write_manifest
from recsys.serving.retrieval.index import IndexKind, build_index, require_faiss, write_index
from recsys.serving.retrieval.item_vectors import VectorKind, item_vectors
from recsys.serving.retrieval.user_tower import write_user_tower

logger = logging.getLogger(__name__)

VECTORS, ITEMS, INDEX, QUERIES = "vectors.npy", "items.parquet", "index.faiss", "queries"


@dataclass
class VectorsManifest(BaseManifest):
    """Contents of a folder of item vectors.

    ranking: the model's name. vectors: content or item_tower. num_items, dim: size of the vectors.
    target_item, history: columns of the schema. index: kind of the index; None without one.
    normalized: vectors in the index have length one, so that it compares cosines. tower: size and
    hashes of the user tower's graph; empty without one.
    """

    run: str
    ranking: str
    vectors: VectorKind
    num_items: int
    dim: int
    target_item: str
    history: str | None
    index: IndexKind | None
    normalized: bool
    tower: dict[str, Any] = field(default_factory=dict)


def export_vectors(
    run: Path,
    out: Path,
    kind: VectorKind | None,
    index: IndexKind | None,
    ranks: Ranks,
    data: str | None = None,
) -> VectorsManifest:
    """Write the vectors of all items of a run's best model; they appear whole or not at all.

    Args:
        run: folder of the finished run.
        out: a folder that does not exist.
        kind: content: of any model with content; item_tower: of two_tower, with its user tower;
            None: item_tower of two_tower, else content.
        index: also build an index of this kind.
        ranks: this process alone.
        data: dataset whose items are exported; default the dataset of the run.

    Raises:
        ValueError: there are several ranks, the folder exists, the run is not finished or has no
            such vectors, or FAISS is not installed.
    """
    if index is not None:
        require_faiss()
    job = load_for_export(run, out, ranks, data)
    if kind is None:
        kind = "item_tower" if isinstance(job.em3.ranking, TwoTower) else "content"
    tower: dict[str, Any] = {}
    with whole_folder(out) as partial:
        if kind == "item_tower":
            (partial / QUERIES).mkdir()
            tower = write_user_tower(run, job, partial / QUERIES).files[GRAPH]
        manifest = _write(partial, run, job, kind, index)
        manifest.tower = tower
        write_manifest(partial, manifest, leave_out=QUERIES)
    return manifest


def _write(
    folder: Path, run: Path, job: Job, kind: VectorKind, index: IndexKind | None
) -> VectorsManifest:
    """Write vectors, ids and index of all items; return their manifest."""
    of_items = item_vectors(job, kind)
    vectors, (num_items, dim) = of_items.vectors, of_items.vectors.shape
    np.save(folder / VECTORS, vectors)
    pq.write_table(pa.table({"id": of_items.ids, "row": of_items.rows}), folder / ITEMS)
    manifest = VectorsManifest(
        run=str(run),
        ranking=job.config.ranking.name,
        vectors=kind,
        num_items=num_items,
        dim=dim,
        target_item=job.schema.target_item,
        history=job.schema.history,
        index=index,
        normalized=kind == "content",
    )
    if index is not None:
        searched = unit(vectors) if manifest.normalized else vectors
        write_index(build_index(searched, index), folder / INDEX)
        manifest.versions["faiss"] = require_faiss().__version__
    return manifest


def unit(vectors: np.ndarray) -> np.ndarray:  # [N, V] -> [N, V]
    """Return the vectors with length one; a vector of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
