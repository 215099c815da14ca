"""Semantic ids: a few codes per item, from coarse to fine, that similar items share.

Residual k-means, as in QARM (arXiv 2411.11739): the first codebook clusters the content vectors,
each further one what the codebooks before it leave of them. Vectors are compared by direction. The
codes of an item depend on its vector and the codebooks alone, so that items added later get codes
without changing those of others.

Shapes: I items, D content dimension, L levels, C codes of a level.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys.serving.retrieval.index import require_faiss
from recsys.serving.retrieval.vectors_folder import unit

ITERATIONS = 25
TRAINED_ON = 1024  # vectors per code, at most
ITEMS_PER_BLOCK = 4096
SHOWN = 5  # of the items that share their codes with most others


def check_codes(codes: int, num_items: int) -> None:
    """Raise a ValueError if there are more codes of a level than trained items."""
    if codes > num_items:
        raise ValueError(
            f"--codes is {codes}, but {num_items:,} items have training rows; set at most that"
        )


@dataclass(frozen=True)
class Codebooks:
    """Centres of each level.

    Example::

        vectors = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
        Codebooks.fit(vectors, levels=2, codes=4).codes_of(vectors)  # int64 [100, 2], in [0, 4)
    """

    centres: np.ndarray  # float32 [L, C, D]

    @staticmethod
    def fit(vectors: np.ndarray, levels: int, codes: int, seed: int = 0) -> Codebooks:  # [I, D]
        """Cluster vectors, and what each level leaves of them.

        Raises:
            ValueError: there are fewer vectors than codes, or FAISS is not installed.
        """
        check_codes(codes, len(vectors))
        faiss, rest, centres = require_faiss(), unit(vectors), []
        for _ in range(levels):
            means = faiss.Kmeans(
                rest.shape[1],
                codes,
                niter=ITERATIONS,
                seed=seed,
                min_points_per_centroid=1,
                max_points_per_centroid=TRAINED_ON,
            )
            means.train(np.ascontiguousarray(rest))
            centres.append(means.centroids.copy())
            rest = rest - centres[-1][_nearest(rest, centres[-1])]
        return Codebooks(np.stack(centres))

    @property
    def num_ids(self) -> int:
        """Number of different ids, L * C."""
        return self.centres.shape[0] * self.centres.shape[1]

    def codes_of(self, vectors: np.ndarray) -> np.ndarray:  # float32 [I, D] -> int64 [I, L]
        """Return the codes of content vectors, each in [0, C)."""
        rest, codes = unit(vectors), []
        for centres in self.centres:
            codes.append(_nearest(rest, centres))
            rest = rest - centres[codes[-1]]
        return np.stack(codes, axis=1)

    def ids_of(self, vectors: np.ndarray) -> np.ndarray:  # float32 [I, D] -> int64 [I, L]
        """Return ids that differ between levels: code + level * C, in [0, L * C)."""
        levels, codes = self.centres.shape[:2]
        return self.codes_of(vectors) + np.arange(levels) * codes


def _nearest(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:  # [I, D], [C, D] -> [I]
    """Return the nearest centre of each vector."""
    wide = centres.astype(np.float64)  # whatever the block, an item has the same code
    halves = (wide**2).sum(axis=1) / 2

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(vectors), ITEMS_PER_BLOCK):
            products = vectors[start : start + ITEMS_PER_BLOCK].astype(np.float64) @ wide.T
            yield (products - halves).argmax(axis=1)

    return np.concatenate([np.zeros(0, np.int64), *blocks()])


def collision_report(codes: np.ndarray, ids: list[Any], num_codes: int) -> dict[str, Any]:
    """Describe how many items share all their codes [I, L], and how evenly each level uses its own.

    `perplexity` is the number of codes that, used evenly, would tell as much.
    """
    _, inverse, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    largest = np.flatnonzero(inverse == counts.argmax())
    levels = []
    for level in codes.T:
        share = np.bincount(level, minlength=num_codes) / len(level)
        used = share[share > 0]
        perplexity = float(np.exp(-(used * np.log(used)).sum()))
        levels.append({"codes": num_codes, "used": len(used), "perplexity": perplexity})
    return {
        "items": len(codes),
        "distinct": len(counts),
        "colliding": int(counts[counts > 1].sum()),
        "largest": int(counts.max()),
        "largest_items": [ids[place] for place in largest[:SHOWN]],
        "levels": levels,
    }


def format_collisions(report: dict[str, Any]) -> str:
    """Format a `collision_report` as text."""
    items = max(report["items"], 1)
    lines = [
        f"items {report['items']:,}; different semantic ids {report['distinct']:,}",
        f"items that share theirs with another: {report['colliding']:,} "
        f"({report['colliding'] / items:.2%}); largest group: {report['largest']:,} items, "
        f"such as {report['largest_items']}",
    ]
    for number, level in enumerate(report["levels"]):
        lines.append(
            f"level {number}: {level['used']} of {level['codes']} codes used, "
            f"perplexity {level['perplexity']:.1f}"
        )
    return "\n".join(lines)
