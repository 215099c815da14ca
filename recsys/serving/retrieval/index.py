"""FAISS indexes of item vectors, searched by dot product (extra `retrieve`).

Shapes: I items, V width, Q queries, K results.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recsys.extras import missing_extra

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
