"""Draw ID and content vectors in the plane, and measure how close the contrastive loss brings them.

Shapes: I items, D dimension.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from recsys.diagnostics.run_report.item_vectors import ItemVectors
from recsys.diagnostics.run_report.map_colours import Categories, Paint, by_category, by_count
from recsys.diagnostics.run_report.neighbours import (
    NEIGHBOURS,
    chance_of_same_category,
    same_category_share,
)
from recsys.diagnostics.run_report.page import Drawing, Section, Table, drawn, new_figure, number

TITLE = "Embedding maps"


def principal_plane(vectors: Tensor) -> tuple[Tensor, float]:  # [I, D] -> [I, 2]
    """Return the first two principal components and their share of the variance.

    Example::

        principal_plane(torch.tensor([[3.0, 0, 0], [-3.0, 0, 0]]))[1]  # 1.0
    """
    centred = vectors.double() - vectors.double().mean(dim=0)
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    plane = F.pad((left * sizes)[:, :2], (0, max(0, 2 - len(sizes))))
    return plane, float(sizes[:2].square().sum() / sizes.square().sum().clamp(min=1e-30))


def pair_cosines(
    ids: Tensor,  # [I, D]
    content: Tensor,  # [I, D]
) -> tuple[float, float]:
    """Return the mean cosine of ID and content vector of one item, and of two different items."""
    cosines = F.normalize(ids, dim=1) @ F.normalize(content, dim=1).T  # [I, I]
    own = cosines.diagonal()
    others = (cosines.sum() - own.sum()) / max(1, cosines.numel() - len(own))
    return float(own.mean()), float(others)


def embedding_maps(
    vectors: ItemVectors,
    item_counts: np.ndarray,  # int64 [I]
    categories: Categories | None = None,
) -> Section:
    """Return the section; words name the kinds of vectors that the model lacks.

    The categories of the items colour the maps; None: their training impressions do.
    """
    if len(vectors.items) < 3:
        return Section(TITLE, ["Too few items have training impressions for a map."])
    before, after = _kinds(vectors)
    words, tables = _ties(vectors)
    paint, notes = by_count(item_counts), {}
    # A share needs two items to compare.
    if categories and sum(value is not None for value in categories.values) > 1:
        paint = by_category(categories)
        shares = {
            kind: same_category_share(of, categories.values)
            for kind, of in (before | after).items()
        }
        chance = chance_of_same_category(categories.values)
        notes = {
            kind: f"{_percent(share)} same {categories.column}, chance {_percent(chance)}"
            for kind, share in shares.items()
        }
        words.append(_on_neighbours(shares, chance, categories.column))
        rows = [(kind, _percent(share, 1)) for kind, share in {**shares, "chance": chance}.items()]
        head = f"{NEIGHBOURS} nearest items by", f"same {categories.column}"
        tables.append(Table(head, rows))
    drawings = [_map("embeddings", before, paint, notes)]
    if after:
        drawings.append(_map("contrastive-embeddings", after, paint, notes))
    return Section(TITLE, words, drawings, tables)


def _kinds(vectors: ItemVectors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return vectors by name: those of the model, and those after the maps of CIC."""
    before = {"ID vectors": vectors.ids}
    if vectors.content is not None:
        before["content vectors"] = vectors.content
    if vectors.contrastive is None:
        return before, {}
    ids, content = vectors.contrastive
    return before, {"ID vectors, mapped by CIC": ids, "content vectors, mapped by CIC": content}


def _ties(vectors: ItemVectors) -> tuple[list[str], list[Table]]:
    """Return words and table on the similarity of an item's ID and content vectors."""
    if vectors.content is None:
        return ["The model has no content branch, so there are ID vectors alone."], []
    if vectors.contrastive is None:
        return ["The run has no Content-ID-Contrastive loss: nothing ties the two kinds."], []
    own, others = pair_cosines(*vectors.contrastive)
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
    return words, [Table(head, rows)]


def _on_neighbours(shares: dict[str, float], chance: float, column: str) -> str:
    best = max(shares, key=lambda kind: shares[kind])
    most = ", the most of all kinds of vectors" if len(shares) > 1 else ""
    return (
        f"Of the {NEIGHBOURS} items nearest to an item by cosine, {_percent(shares[best])} have "
        f"the same {column} for {best}{most}; of items drawn at random {_percent(chance)} would. "
        "Where an item has several, the first counts."
    )


def _percent(share: float, decimals: int = 0) -> str:
    return f"{100 * share:.{decimals}f} %"


def _map(name: str, kinds: dict[str, Tensor], paint: Paint, notes: dict[str, str]) -> Drawing:
    figure, places = new_figure(len(kinds))
    planes = []
    for axes, (title, vectors) in zip(places, kinds.items()):
        plane, share = principal_plane(vectors)
        planes.append(plane.numpy())
        lines = [f"{title} ({_percent(share)} of the variance)"]
        if title in notes:
            lines.append(f"{NEIGHBOURS} nearest: {notes[title]}")
        axes.set_title("\n".join(lines), parse_math=False)
    paint(figure, places, planes)
    caption = (
        f"The {len(planes[0]):,} items seen most in training, by the two principal components of "
        f"each kind of vector: {' and '.join(kinds)}."
    )
    return drawn(name, figure, caption)
