"""ID and content vectors of items in the plane, and how well the contrastive loss ties them.

Shapes: I items, D dimension.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from recsys.report.item_vectors import ItemVectors
from recsys.report.page import Drawing, Section, Table, drawn, new_figure, number


def principal_plane(vectors: Tensor) -> tuple[Tensor, float]:  # [I, D] -> [I, 2]
    """The two principal components, and the share of the variance that they hold.

    Example::

        principal_plane(torch.tensor([[3.0, 0, 0], [-3.0, 0, 0]]))[1]  # 1.0
    """
    centred = vectors.double() - vectors.double().mean(dim=0)
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    plane = F.pad((left * sizes)[:, :2], (0, max(0, 2 - len(sizes))))
    return plane, float(sizes[:2].square().sum() / sizes.square().sum().clamp(min=1e-30))


def pair_cosines(ids: Tensor, content: Tensor) -> tuple[float, float]:
    """Mean cosine of an item's two vectors [I, D], and of vectors of two different items."""
    cosines = F.normalize(ids, dim=1) @ F.normalize(content, dim=1).T  # [I, I]
    own = cosines.diagonal()
    others = (cosines.sum() - own.sum()) / max(1, cosines.numel() - len(own))
    return float(own.mean()), float(others)


def embedding_maps(vectors: ItemVectors, item_counts: np.ndarray) -> Section:
    """The section; what the model has no vectors for is said in words."""
    if len(vectors.items) < 3:
        return Section("Embedding maps", ["Too few items have training impressions for a map."])
    colours = np.log10(item_counts[vectors.items])
    before = {"ID vectors": vectors.ids}
    if vectors.content is None:
        words = ["The model has no content branch, so there are ID vectors alone."]
        return Section("Embedding maps", words, [_map("embeddings", before, colours)])
    before["content vectors"] = vectors.content
    drawings = [_map("embeddings", before, colours)]
    if vectors.contrastive is None:
        words = ["The run has no Content-ID-Contrastive loss: nothing ties the two kinds."]
        return Section("Embedding maps", words, drawings)
    ids, content = vectors.contrastive
    mapped = {"ID vectors, mapped by CIC": ids, "content vectors, mapped by CIC": content}
    drawings.append(_map("contrastive-embeddings", mapped, colours))
    own, others = pair_cosines(ids, content)
    words = [
        f"Behind the maps of Content-ID-Contrastive (CIC), ID and content vector of one item have "
        f"a mean cosine of {own:.3f}, those of two different items {others:.3f}. The further "
        "apart, the better content tells where an item's ID lies."
    ]
    rows: list[tuple[str, ...]] = [("one item", number(own)), ("two items", number(others))]
    before_too = vectors.ids.shape[1] == vectors.content.shape[1]
    if before_too:
        raw = pair_cosines(vectors.ids, vectors.content)
        rows = [(name, number(value), after) for value, (name, after) in zip(raw, rows)]
    head = ("mean cosine of ID and content", *(["before CIC"] if before_too else []), "after CIC")
    return Section("Embedding maps", words, drawings, [Table(head, rows)])


def _map(name: str, kinds: dict[str, Tensor], colours: np.ndarray) -> Drawing:
    figure, places = new_figure(len(kinds))
    for axes, (title, vectors) in zip(places, kinds.items()):
        plane, share = principal_plane(vectors)
        points = axes.scatter(
            plane[:, 0].numpy(), plane[:, 1].numpy(), c=colours, s=12, cmap="viridis"
        )
        axes.set_title(f"{title} ({100 * share:.0f} % of the variance)")
    figure.colorbar(points, ax=places, label="log10 of training impressions")
    caption = (
        f"The {len(colours):,} items seen most in training, by the two principal components of "
        f"each kind of vector: {' and '.join(kinds)}."
    )
    return drawn(name, figure, caption)
