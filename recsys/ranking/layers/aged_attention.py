"""Multi-head target attention that reads the age of each item: SIM's exact search unit.

SIM (Pi et al. 2020, arXiv 2006.05639) attends with several heads to the items selected from a long
history, and joins to each an embedding of the time that has passed since. Linear maps of items are
applied to the query instead (the other side of the dot product), so that no
[number of items, D] tensor is created.

Shapes: B batch, U unique history items, K history items attended to, D dimension, H heads, A ages,
P parallel lists.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys.data.jagged_history import JaggedHistory

NUM_AGES = 32


def age_of(gaps: Tensor) -> Tensor:  # [K] -> [K]
    """Return floor(log2(1 + gap)), int64 in [0, NUM_AGES): rows of the table of ages."""
    return torch.log2(1 + gaps.double().clamp(min=0)).long().clamp(max=NUM_AGES - 1)


class AgedAttention(nn.Module):
    """One interest vector per head, mapped to a single interest vector.

    Args:
        dim: D.
        num_parallel: P.
        num_heads: H.
    """

    def __init__(self, dim: int, num_parallel: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, dim**-0.5
        self.query = nn.Linear(dim, num_heads * dim)
        self.ages = nn.Embedding(NUM_AGES, dim)
        nn.init.normal_(self.ages.weight, std=0.01)
        self.parallel_map = nn.Linear(num_parallel, dim, bias=False) if num_parallel else None
        self.output = nn.Linear(num_heads * dim, dim, bias=False)

    def forward(
        self,
        target: Tensor,  # [B, D]
        items: Tensor,  # [U, D]
        history: JaggedHistory,
        parallel: Tensor,  # [K, P]
        ages: Tensor,  # [K]
    ) -> Tensor:  # [B, D]
        """Return the interest of each row in its history, for its target."""
        items = items.float()
        queries = self.query(target).float().unflatten(1, (self.num_heads, -1)) * self.scale
        heads = [
            self._head(query.contiguous(), items, history, parallel, ages)
            for query in queries.unbind(dim=1)
        ]
        return self.output(torch.cat(heads, dim=1))

    def _head(
        self, query: Tensor, items: Tensor, history: JaggedHistory, parallel: Tensor, ages: Tensor
    ) -> Tensor:  # [B, D], [U, D], [K, P], [K] -> [B, D]
        of_ages = query @ self.ages.weight.T  # [B, A]
        places = history.rows * NUM_AGES + ages  # in [B, A], flattened
        scores = history.dot(query, items) + of_ages.flatten().float()[places]
        if self.parallel_map is not None:
            of_parallel = (query @ self.parallel_map.weight).float()
            scores = scores + (history.spread(of_parallel) * parallel).sum(dim=1)
        weights = history.softmax(scores)
        interest = history.weighted_sum(weights, items)
        by_age = weights.new_zeros(of_ages.numel()).index_add(0, places, weights)
        interest = interest + by_age.view_as(of_ages) @ self.ages.weight
        if self.parallel_map is not None:
            interest = interest + self.parallel_map(history.sum(weights.unsqueeze(1) * parallel))
        return interest
