"""Target attention (DIN, Zhou et al. 2018, arXiv 1706.06978): the target weights the history.

Terms of an item alone are computed once per unique item: the first layer of (h, t, h - t, h * t) is
(W1 + W3) h + (W2 - W3) t + W4 (h * t).
Shapes: B batch, U unique history items, N history items of the batch, D dimension, P parallel
lists, H units of the first layer.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.data.jagged_history import JaggedHistory
from recsys.kernels import (
    ScoreWeights,
    has_native,
    native_target_attention,
    result_dtype,
    shared_target_attention,
    target_attention,
)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return numbers of float16 and bfloat16 in float32, and wider ones as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class HistoryAttention(nn.Module):
    """Base of attention to a history: the sum of its items, weighted by the softmax of scores.

    An empty history gives zeros. Under autocast the interest is float32.
    """

    def __init__(self, dim: int, num_parallel: int) -> None:
        super().__init__()
        self.parallel_map = nn.Linear(num_parallel, dim, bias=False) if num_parallel else None

    def scores(
        self, target: Tensor, items: Tensor, history: JaggedHistory, parallel: Tensor
    ) -> Tensor:  # [B, D], [U, D], [N, P] -> [N]
        raise TypeError(f"{type(self).__name__} defines no scores")

    def forward(
        self, target: Tensor, items: Tensor, history: JaggedHistory, parallel: Tensor
    ) -> Tensor:  # [B, D], [U, D], [N, P] -> [B, D]
        scores = at_least_float32(self.scores(target, items, history, parallel))
        dtype = result_dtype(target, items, *self.parameters())
        items = items.to(scores.dtype)
        if history.is_shared:
            weights = scores.view(history.lengths.shape[0], history.longest).softmax(dim=1)
            if self.parallel_map is not None:
                lists = history.of_one_row(parallel).to(weights.dtype)
                items = items + F.linear(lists, self.parallel_map.weight.to(weights.dtype))
            return (weights @ items).to(dtype)  # one product with the vectors that all rows share
        weights = history.softmax(scores)
        interest = history.weighted_sum(weights, items)
        if self.parallel_map is not None:
            lists = history.sum(weights.unsqueeze(1) * parallel)
            interest = interest + F.linear(lists, self.parallel_map.weight.to(lists.dtype))
        return interest.to(dtype)


class MeanOfEvents(HistoryAttention):
    """The mean of the events: attention with equal scores, which does not depend on the target."""

    def scores(
        self, target: Tensor, items: Tensor, history: JaggedHistory, parallel: Tensor
    ) -> Tensor:  # [B, D], [N, D], [N, P] -> [N]
        return torch.zeros_like(history.rows, dtype=items.dtype)


class TargetAttention(HistoryAttention):
    """DIN's attention: an MLP of (item, target, difference, product) scores each item."""

    kernel = "target_attention"

    def __init__(self, dim: int, num_parallel: int, units: list[int]) -> None:
        super().__init__(dim, num_parallel)
        layers: list[nn.Module] = []
        width = 4 * dim
        for unit in units:
            layers += [nn.Linear(width, unit), nn.ReLU(inplace=True)]
            width = unit
        self.score = nn.Sequential(*layers, nn.Linear(width, 1))
        self.rounds_shared = False  # whether products for a shared history have bfloat16 factors

    def packaged(self, bfloat16: bool) -> TargetAttention:  # which shares the weights
        packaged = copy.copy(self)
        packaged.rounds_shared = bfloat16
        return packaged

    def forward(
        self, target: Tensor, items: Tensor, history: JaggedHistory, parallel: Tensor
    ) -> Tensor:  # [B, D], [U, D], [N, P] -> [B, D]
        parallel_map = self.parallel_map
        no_lists = target.new_empty(target.shape[1], 0)
        lists = no_lists if parallel_map is None else parallel_map.weight  # [D, P]
        is_autocast = torch.is_autocast_enabled(target.device.type)
        if history.is_shared and not is_autocast and not torch.is_grad_enabled():
            values = history.of_one_row(parallel)[:, : lists.shape[1]]
            return shared_target_attention(
                target, items, values, lists, self.score, self.rounds_shared
            )
        weights = ScoreWeights.from_layers(self.score)
        may_be_native = isinstance(history, JaggedHistory) and not parallel.requires_grad
        if weights is not None and may_be_native and has_native(target, items, *weights):
            values = parallel[:, : lists.shape[1]]
            return native_target_attention(
                target, items, history.index, history.offsets, values, lists, weights
            )
        return super().forward(target, items, history, parallel)

    def kernel_refusal(self) -> str | None:
        return target_attention.refusal(self.score)

    def scores(
        self, target: Tensor, items: Tensor, history: JaggedHistory, parallel: Tensor
    ) -> Tensor:  # [B, D], [U, D], [N, P] -> [N]
        first = self.score[0]
        assert isinstance(first, nn.Linear)
        w_item, w_target, w_difference, w_product = first.weight.chunk(4, dim=1)  # [H, D]
        w_item, w_target = w_item + w_difference, w_target - w_difference
        item_terms = items @ w_item.T  # [U, H]
        # Under autocast this is bfloat16, and terms added in place must have the same type.
        dtype = item_terms.dtype
        vectors, hidden = history.gather(items.to(dtype)), history.gather(item_terms)  # [N, ...]
        # Added up in place: N is large, and each new [N, ...] costs as much as the arithmetic.
        if self.parallel_map is not None:
            lists, list_weight = parallel.to(dtype), self.parallel_map.weight  # [N, P], [D, P]
            vectors.addmm_(lists, list_weight.T.to(dtype))
            hidden.addmm_(lists, (w_item @ list_weight).T.to(dtype))
        products = vectors * history.spread(target.to(dtype))
        hidden.addmm_(products, w_product.T.to(dtype))
        hidden += history.spread(torch.addmm(first.bias, target, w_target.T).to(dtype))
        return self.score[1:](hidden).squeeze(1)


class DotAttention(HistoryAttention):
    """Scaled dot-product attention: the mapped target times each item, divided by sqrt(D)."""

    def __init__(self, dim: int, num_parallel: int) -> None:
        super().__init__(dim, num_parallel)
        self.query = nn.Linear(dim, dim)
        self.scale = dim**-0.5

    def scores(
        self, target: Tensor, items: Tensor, history: JaggedHistory, parallel: Tensor
    ) -> Tensor:  # [B, D], [U, D], [N, P] -> [N]
        query, list_factors = self.map_query(target)
        scores = history.dot(query, items.to(query.dtype))
        if self.parallel_map is not None and history.is_shared:
            scores = scores + (list_factors @ history.of_one_row(parallel).T).reshape(-1)
        elif self.parallel_map is not None:
            scores = scores + (history.spread(list_factors) * parallel).sum(dim=1)
        return scores

    def map_query(self, target: Tensor) -> tuple[Tensor, Tensor]:  # [B, D] -> [B, D], [B, P]
        """Return the query of each row, and the factors of its parallel lists in the scores."""
        query = at_least_float32(self.query(target)) * self.scale
        if self.parallel_map is None:
            return query, query[:, :0]
        return query, query @ self.parallel_map.weight.to(query.dtype)
