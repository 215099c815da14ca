"""Searches nearest items by cosine, and compares their categories.

Shapes: N queried items, I searched items, K neighbours, D dimension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 10  # nearest items whose category is compared


def nearest(
    queries: Tensor,  # [N, D]
    vectors: Tensor,  # [I, D]
    own: np.ndarray,  # int64 [N], index of each queried item in `vectors`, or -1
    count: int,
) -> tuple[Tensor, Tensor]:  # cosines and places, [N, K], nearest first; K = min(count, I - 1)
    """Return the nearest vectors of each query by cosine, except the item itself.

    Example::

        import numpy as np
        import torch

        vectors = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        cosines, places = nearest(vectors, vectors, np.arange(3), 1)
        places.tolist()  # [[1], [0], [1]]
    """
    cosines = F.normalize(queries.float(), dim=1) @ F.normalize(vectors.float(), dim=1).T
    places = torch.from_numpy(own)
    known = places >= 0
    cosines[known.nonzero()[:, 0], places[known]] = -torch.inf
    found = cosines.topk(min(count, len(vectors) - 1), dim=1)
    return found.values, found.indices


def same_category_share(vectors: Tensor, categories: Sequence[str | None]) -> float:
    """Return the share of the items' nearest `NEIGHBOURS` that have the item's category.

    Args:
        vectors: [I, D], vectors of the items.
        categories: categories of the same items; items without one (None) are left out, also as
            neighbours. At least two items must have one.
    """
    known = [place for place, category in enumerate(categories) if category is not None]
    numbers = {category: number for number, category in enumerate(set(categories))}
    codes = torch.tensor([numbers[categories[place]] for place in known])
    vectors = vectors[known]
    _, places = nearest(vectors, vectors, np.arange(len(known)), NEIGHBOURS)
    return float((codes[places] == codes[:, None]).float().mean())


def chance_of_same_category(categories: Sequence[str | None]) -> float:
    """Return the probability that two different items drawn at random share a category.

    Example::

        chance_of_same_category(["a", "a", "b", None])  # 1 of 3 pairs
    """
    counts = Counter(category for category in categories if category is not None).values()
    total = sum(counts)
    return sum(count * (count - 1) for count in counts) / (total * (total - 1))
