"""Item vectors: what `recsys export-vectors` writes and `recsys retrieve` reads.

`vectors.npy`, `items.parquet` and `index.faiss`, a FAISS index of dot products (extra `retrieve`),
have the same order. `queries/` is the user tower.
Shapes: I items, D content dimension, V width of a vector, Q queries, K results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job
from recsys.data.items.item_table import ItemTable
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.ranks import Ranks
from recsys.evaluation.retrieval import catalogue_of, catalogue_vectors
from recsys.extras import missing_extra
from recsys.ranking.two_tower import TwoTower
from recsys.serving.export import encoded_blocks, load_for_export
from recsys.serving.package import GRAPH, BaseManifest, write_manifest
from recsys.serving.retrieval.user_tower import write_user_tower
from recsys.storage.files import whole_folder

IndexKind = Literal["flat", "ivf", "hnsw"]

HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 128, 128
IVF_CLUSTERS, IVF_PROBED = 4.0, 1 / 16  # times the root of I; share of the clusters
IVF_TRAINED_ON = 64  # vectors per cluster


def require_faiss() -> Any:
    """Import FAISS; a ValueError says how to install it."""
    try:
        import faiss
    except ImportError as error:
        raise missing_extra("retrieve", "an index of vectors", error) from error
    return faiss


def unit(vectors: np.ndarray) -> np.ndarray:  # [I, V] -> [I, V]
    """Return the vectors with length one; a vector of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)


def build_index(vectors: np.ndarray, kind: IndexKind) -> Any:  # float32 [I, V]
    """Build an index by dot product: of all vectors, of clusters, or a graph of neighbours."""
    faiss = require_faiss()
    num_items, dim = vectors.shape
    clusters = max(1, min(int(IVF_CLUSTERS * math.sqrt(num_items)), num_items))
    names = {"flat": "Flat", "hnsw": f"HNSW{HNSW_LINKS}", "ivf": f"IVF{clusters},Flat"}
    index = faiss.index_factory(dim, names[kind], faiss.METRIC_INNER_PRODUCT)
    if kind == "hnsw":
        index.hnsw.efConstruction, index.hnsw.efSearch = HNSW_BUILD, HNSW_SEARCH
    elif kind == "ivf":
        index.cp.min_points_per_centroid = 1
        sample = np.random.default_rng(0).permutation(num_items)[: clusters * IVF_TRAINED_ON]
        index.train(vectors[np.sort(sample)])
        index.nprobe = math.ceil(clusters * IVF_PROBED)
    index.add(vectors)
    return index


def read_index(path: Path) -> Any:
    """Read an index; a ValueError says that FAISS is not installed, or cannot read the file."""
    faiss = require_faiss()
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: cannot be read by FAISS ({error}); export it again") from error


def search_index(
    index: Any, queries: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:  # float32 [Q, V] -> float32 [Q, K], int64 [Q, K]
    """Return the highest dot products of each query and the items' positions; -1: none found."""
    parameters = None
    if hasattr(index, "hnsw"):
        parameters = require_faiss().SearchParametersHNSW(efSearch=max(HNSW_SEARCH, count))
    queries = np.ascontiguousarray(queries, np.float32)
    return index.search(queries, min(count, index.ntotal), params=parameters)


VectorKind = Literal["content", "item_tower"]

VECTORS, ITEMS, INDEX, QUERIES = "vectors.npy", "items.parquet", "index.faiss", "queries"


@dataclass
class VectorsManifest(BaseManifest):
    """Contents of a folder of item vectors."""

    run: str
    ranking: str
    vectors: VectorKind
    num_items: int
    dim: int
    target_item: str
    history: str | None
    index: IndexKind | None
    normalized: bool  # vectors in the index have length one, so that it compares cosines
    tower: dict[str, Any] = field(default_factory=dict)  # size and hashes of the tower's graph


@dataclass(frozen=True)
class ItemVectors:
    """Vectors of the same items: rows of the item's table, raw ids and vectors, by place."""

    rows: np.ndarray  # int64 [I], rising
    ids: pa.Array  # int64 or string [I]
    vectors: np.ndarray  # float32 [I, V]


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
        ranks: a single process.
        data: dataset whose items are exported; default the dataset of the run.

    Raises:
        ValueError: the run is not finished or has no such vectors, or FAISS is not installed.
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
    items = item_vectors(job, kind)
    num_items, dim = items.vectors.shape
    np.save(folder / VECTORS, items.vectors)
    pq.write_table(pa.table({"id": items.ids, "row": items.rows}), folder / ITEMS)
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
        faiss = require_faiss()
        vectors = unit(items.vectors) if manifest.normalized else items.vectors
        faiss.write_index(build_index(vectors, index), str(folder / INDEX))
        manifest.versions["faiss"] = faiss.__version__
    return manifest


def item_vectors(job: Job, kind: VectorKind) -> ItemVectors:
    """Compute the vectors of the items that `recsys evaluate` ranks. A collective.

    Raises:
        ValueError: the run has no content, or raw ids are not known.
    """
    ids = raw_ids(job)
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


def raw_ids(job: Job) -> pa.Array:
    """Return the raw ids of the items that `recsys evaluate` ranks; ValueError: they are hashed."""
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
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    return ids.cast(pa.int64() if pa.types.is_integer(ids.type) else pa.string())
