"""A blend of a two-tower model with its baselines, as files of a folder of item vectors.

Terms that are dot products are concatenated in one vector per item: model, content, logarithm of
the count. The other terms are neighbours of the history's items, summed with their weights in one
matrix. An item's score is the dot product plus the mean of its matrix entries over the history.
Entries are not negative, so the best items are among the index's best and the neighbours.

Shapes: I items, V width of a vector, H items of a history, N neighbours, K results.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, load_npz, save_npz

from recsys.serving.retrieval.baselines import Blend, Catalogue

NEIGHBOURS = "neighbours.npz"


@dataclass(frozen=True)
class ServedBlend:
    """Weights and widths of the terms of vectors, in order, and weighted neighbours [I, I]."""

    decay: float
    weights: dict[str, float]
    widths: dict[str, int]
    neighbours: csr_matrix

    @staticmethod
    def make(catalogue: Catalogue, blend: Blend) -> tuple[ServedBlend, np.ndarray]:  # [I, V]
        """Return a blend to serve, and the vectors of its items."""
        weights = {name: weight for name, weight in blend.weights.items() if weight}
        vectors = {"model": catalogue.vectors["model"]}  # an index needs a vector of each item
        if "content" in weights:
            vectors["content"] = catalogue.vectors["content"]
        if "popularity" in weights:
            vectors["popularity"] = catalogue.popularity[:, np.newaxis]
        neighbours = csr_matrix((len(catalogue.popularity),) * 2, dtype=np.float32)
        for name, matrix in catalogue.neighbours.items():
            if name in weights:
                neighbours = neighbours + weights[name] * matrix
        served_blend = ServedBlend(
            blend.decay,
            {name: float(weights.get(name, 0)) for name in vectors},
            {name: matrix.shape[1] for name, matrix in vectors.items()},
            neighbours.astype(np.float32),
        )
        return served_blend, np.concatenate([*vectors.values()], axis=1)

    def write(self, folder: Path) -> None:
        save_npz(folder / NEIGHBOURS, self.neighbours)

    @staticmethod
    def read(
        folder: Path, decay: float, weights: dict[str, float], widths: dict[str, int]
    ) -> ServedBlend:
        return ServedBlend(decay, weights, widths, load_npz(folder / NEIGHBOURS).tocsr())

    def age_weights(self, indices: np.ndarray) -> np.ndarray:  # [H], -1: no item -> float32 [H]
        """Return the weights of a history, oldest first, which add up to 1."""
        ages = np.arange(len(indices) - 1, -1, -1, dtype=np.float64)
        weights = np.where(indices >= 0, self.decay**ages, 0)
        shares: np.ndarray = (weights / max(weights.sum(), np.finfo(float).tiny)).astype(np.float32)
        return shares

    def query(
        self, query: np.ndarray, indices: np.ndarray, vectors: np.ndarray
    ) -> np.ndarray:  # float32 of the model's, int64 [H], float32 [I, V] -> float32 [V]
        """Return the vector whose dot product with an item's is the sum of the terms of vectors."""
        terms, start = [], 0
        shares, history = self.age_weights(indices), vectors[indices.clip(min=0)]
        for name, width in self.widths.items():
            term = {"model": query, "popularity": np.ones(1, np.float32)}.get(name)
            if term is None:
                term = shares @ history[:, start : start + width]
            terms.append(self.weights[name] * term)
            start += width
        return np.concatenate(terms).astype(np.float32)

    def search(
        self,
        query: np.ndarray,  # float32 [V]
        history: np.ndarray,  # int64 [H] indices, -1: no item
        nearest: np.ndarray,  # int64 indices of the index's best
        vectors: np.ndarray,  # float32 [I, V]
    ) -> tuple[np.ndarray, np.ndarray]:  # float32, int64, of the best and of neighbours
        """Return scores and indices of the best items by all terms, best first."""
        is_item = history >= 0
        shares = csr_matrix(self.age_weights(history)[is_item])
        near = (shares @ self.neighbours[history[is_item]]).tocsr()
        indices = np.union1d(nearest, near.indices)
        scores = vectors[indices] @ query
        scores[np.searchsorted(indices, near.indices)] += near.data
        best = np.argsort(-scores, kind="stable")
        return scores[best], indices[best]
