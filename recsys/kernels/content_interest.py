"""Operator `recsys::content_interest`: attention and cosines over items without gradient.

A linear map of the items moves to the B queries: q . (M v) = (M^T q) . v.
Shapes: B batch, U unique items, N history items of the batch, D dimension, S spaces with
similarities, P parallel lists, F features of a space.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recsys.kernels.operators import Operator, as_float32, as_int64

_INPUTS = (
    "Tensor queries, Tensor items, Tensor map, Tensor index, Tensor offsets, Tensor of_lists, "
    "Tensor parallel"
)


def native_content_interest(
    queries: Tensor,  # [B, 1 + S, D]: of the attention, then a unit vector in each space
    items: Tensor,  # [U, max(S, 1) * D or more], without gradient: a vector per space
    map_: Tensor,  # [D, D], M of the first vectors, which `items` has before the map
    index: Tensor,  # int64 [N], the item at each place, one row after the other
    offsets: Tensor,  # int64 [B + 1]; places of a row are `offsets[b]` to `offsets[b + 1]`
    list_factors: Tensor,  # [B, P], factors of the parallel lists in the scores
    parallel: Tensor,  # [N, P], numbers beside each place, without gradient
) -> tuple[Tensor, Tensor]:  # [B, D + P], [B, S * F]
    """Return attention's weighted sums and the similarity features, in float32, by a kernel.

    Sums are of the items' first vectors v and the lists, by the softmax of queries[b, 0] . v +
    list_factors[b] . parallel[n]. Features are those of `similarity_features`. Queries of the first
    vector have passed the transposed map.
    """
    operator = "content_interest"
    vectors = as_float32(operator, queries=queries, items=items, map=map_)
    places = as_int64(operator, index=index, offsets=offsets)
    lists = as_float32(operator, of_lists=list_factors, parallel=parallel)
    sums, features, *_ = torch.ops.recsys.content_interest(*vectors, *places, *lists)
    return sums, features


def _fake(queries: Tensor, items: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    _, index, _, _, parallel = rest
    batch, spaces, dim = queries.shape[0], queries.shape[1] - 1, queries.shape[2]
    lists, places = parallel.shape[1], index.shape[0]
    return (
        queries.new_empty(batch, dim + lists),
        queries.new_empty(batch, spaces * (2 + 5 * lists)),
        queries.new_empty(places),
        queries.new_empty(spaces, places),
        queries.new_empty(items.shape[0], spaces),
    )


Operator(
    "content_interest",
    inputs=_INPUTS,
    backward_inputs="Tensor of_sums, Tensor of_features, Tensor weights, Tensor cosines, "
    f"Tensor inverse, {_INPUTS}",
    gradients=("queries", "map", "of_lists"),
    num_outputs=5,
    num_results=2,
    without_gradient=("items", "parallel"),
).define(_fake)
