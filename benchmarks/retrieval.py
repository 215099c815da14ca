"""Speed and recall of the indexes of `recsys export-vectors`, beside exact search.

    python -m benchmarks.retrieval

Unit vectors are clustered points of few dimensions, mapped by a fixed network. Queries come one at
a time on one thread. Exits with 1 if `hnsw` over the most items misses more than 2 % of what exact
search finds, or is not ten times as fast.

Shapes: I items, Q queries, V width, K results.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
from jsonargparse import auto_cli

from benchmarks.results import RESULTS, Result, write_result
from recsys.serving.retrieval.catalogue import unit
from recsys.serving.retrieval.item_vectors import (
    IndexKind,
    build_index,
    require_faiss,
    search_index,
)

MAX_MISSED, MIN_SPEED_UP = 0.02, 10.0  # of the graph
KINDS: tuple[IndexKind, ...] = ("flat", "ivf", "hnsw")
LATENT, CLUSTERS, SPREAD = 16, 2000, 0.5
ROWS_PER_BLOCK = 65_536
WARM_UP = 10


@dataclass(frozen=True)
class Measured:
    """An index: seconds to build it, milliseconds of a query, and the share of exact results."""

    index: str
    items: int
    dim: int
    build_seconds: float
    p50: float
    p99: float
    speed_up: float
    recall: dict[int, float]  # by K

    @property
    def reaches_aim(self) -> bool:
        is_exact = all(share >= 1 - MAX_MISSED for share in self.recall.values())
        return is_exact and self.speed_up >= MIN_SPEED_UP


def synthetic_vectors(items: int, queries: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors of items float32 [I, V] and of queries float32 [Q, V]."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((CLUSTERS, LATENT), np.float32)
    first = random.standard_normal((LATENT, 2 * dim), np.float32) / LATENT**0.5
    second = random.standard_normal((2 * dim, dim), np.float32)

    def block(count: int) -> np.ndarray:  # [count, V]
        noise = random.standard_normal((count, LATENT), np.float32)
        points = centres[random.integers(CLUSTERS, size=count)] + SPREAD * noise
        return unit(np.tanh(points @ first) @ second)

    sizes = [min(ROWS_PER_BLOCK, items - start) for start in range(0, items, ROWS_PER_BLOCK)]
    return np.concatenate([block(size) for size in sizes]), block(queries)


def retrieval(
    items: tuple[int, ...] = (1, 1000, 100_000, 1_000_000),
    dim: int = 64,
    queries: int = 500,
    depths: tuple[int, ...] = (10, 100),
    results: Path = RESULTS,
) -> bool:
    """Measure all indexes and return whether the aim is reached.

    Args:
        items: numbers of vectors in the index.
        dim: their width.
        queries: searches of each index that count.
        depths: numbers of results of which the recall is computed; the highest is asked for.
        results: folder for the figures.
    """
    measured = [row for size in items for row in _measured(size, dim, queries, depths)]
    (graph,) = (row for row in measured if row.index == "hnsw" and row.items == max(items))
    write_result(_result(measured, graph, depths), results)
    return graph.reaches_aim


def _measured(items: int, dim: int, queries: int, depths: tuple[int, ...]) -> Iterator[Measured]:
    vectors, query_vectors = synthetic_vectors(items, queries + WARM_UP, dim)
    exact, exact_p50 = np.zeros((0, 0), np.int64), 0.0
    for kind in KINDS:
        start = time.perf_counter()
        index = build_index(vectors, kind)
        build = time.perf_counter() - start
        seconds, matches = _search(index, query_vectors, max(depths))
        if kind == "flat":
            exact, exact_p50 = matches, median(seconds)
        recall = {depth: _shared(exact, matches, depth) for depth in depths}
        p50, p99 = median(seconds), quantiles(seconds, n=100)[98]
        speed_up = exact_p50 / p50
        row = Measured(kind, items, dim, build, 1e3 * p50, 1e3 * p99, speed_up, recall)
        print(asdict(row), flush=True)
        yield row


def _search(index: Any, queries: np.ndarray, count: int) -> tuple[list[float], np.ndarray]:
    faiss = require_faiss()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    seconds, matches = [], []
    for query in range(len(queries)):
        start = time.perf_counter()
        matches.append(search_index(index, queries[query : query + 1], count)[1][0])
        seconds.append(time.perf_counter() - start)
    faiss.omp_set_num_threads(threads)
    return seconds[WARM_UP:], np.stack(matches[WARM_UP:])


def _shared(
    exact: np.ndarray,  # [Q, K]
    matches: np.ndarray,  # [Q, K]
    depth: int,
) -> float:
    pairs = zip(exact[:, :depth], matches[:, :depth], strict=True)
    return float(np.mean([len(np.intersect1d(*pair)) / len(pair[0]) for pair in pairs]))


def _result(measured: list[Measured], graph: Measured, depths: tuple[int, ...]) -> Result:
    columns = ["index", "items", "build, s", "p50, ms", "p99, ms", "x flat"]
    columns += [*(f"recall@{depth} of flat" for depth in depths), "aim"]
    verdict = "reached" if graph.reaches_aim else "missed"
    rows = [
        (
            row.index,
            f"{row.items:,}",
            f"{row.build_seconds:.1f}",
            f"{row.p50:.3f}",
            f"{row.p99:.3f}",
            f"{row.speed_up:.1f}",
            *(f"{row.recall[depth]:.4f}" for depth in depths),
            verdict if row is graph else "",
        )
        for row in measured
    ]
    reading = [
        f"Synthetic vectors of {measured[0].dim} numbers (`benchmarks/retrieval`), one query at a "
        "time on one thread; indexes are built on all threads. Recall is the share of the exact "
        f"results. The aim, for the most items: hnsw misses at most {MAX_MISSED:.0%}, and is at "
        f"least {MIN_SPEED_UP:g} times as fast as flat.",
    ]

    records = [{"benchmark": "retrieval", **asdict(row)} for row in measured]
    return Result("retrieval", "Indexes of item vectors", records, columns, rows, None, reading)


if __name__ == "__main__":
    sys.exit(0 if auto_cli(retrieval, as_positional=False) else 1)
