"""Operator `recsys::content_interest`: attention and cosines over items without gradient.

A linear map of the items moves to the other side of each dot product: q . (M v) = (M^T q) . v, so
that the map is applied to the B queries and the B weighted sums and not to the U items, of which a
batch has many times more. The C++ kernel reads an item's row once per place for all dot products,
and its backward writes nothing of size [U, D], as items of a memory bank get no gradient.

Shapes: B batch, U unique items, N history items of the batch, D dimension, S spaces with
similarities, P parallel lists, F features of a space.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys.kernels.checks import (
    as_float32,
    as_int64,
    refuse_gradient,
    refuse_second_derivative,
)

_INPUTS = (
    "Tensor queries, Tensor items, Tensor map, Tensor index, Tensor offsets, Tensor of_lists, "
    "Tensor parallel"
)
torch.library.define(
    "recsys::content_interest", f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define(
    "recsys::content_interest_backward",
    "(Tensor of_sums, Tensor of_features, Tensor weights, Tensor cosines, Tensor inverse, "
    f"{_INPUTS}) -> (Tensor, Tensor, Tensor)",
)


def native_content_interest(
    queries: Tensor,  # [B, 1 + S, D]
    items: Tensor,  # [U, max(S, 1) * D or more]
    map_: Tensor,  # [D, D]
    index: Tensor,  # int64 [N]
    offsets: Tensor,  # int64 [B + 1]
    of_lists: Tensor,  # [B, P]
    parallel: Tensor,  # [N, P]
) -> tuple[Tensor, Tensor]:  # [B, D + P], [B, S * F]
    """Return attention's weighted sums and the similarity features, in float32, by a kernel.

    The sums are those of the items' first vectors and of the parallel lists, by softmax weights of
    the scores `queries[b, 0] . v + of_lists[b] . parallel[n]`. The features are those of
    `recsys.ranking.layers.content_interest.similarity_features` for the cosines of each space.

    Args:
        queries: a row's query of the attention, then its unit vector in each space. Those that meet
            the first vector have passed the transposed map.
        items: rows of unique items, which get no gradient: a vector of D numbers per space, the
            first of them not yet mapped.
        map_: the map M of the first vectors; their cosines are divided by the length of M v.
        index: the item at each place, one row after the other.
        offsets: places of a row are `offsets[b]` to `offsets[b + 1]`.
        of_lists: factors of the parallel lists in the scores.
        parallel: numbers beside each place, which get no gradient.

    Raises:
        ValueError: an input is of a type that kernels do not read.

    Example::

        import torch
        from recsys.kernels import has_native, native_content_interest

        queries, items = torch.rand(2, 2, 4), torch.rand(3, 4)
        index, offsets = torch.tensor([0, 2, 0]), torch.tensor([0, 2, 3])
        if has_native(queries, items):
            liked, factors = torch.ones(3, 1), torch.zeros(2, 1)
            inputs = (queries, items, torch.eye(4), index, offsets, factors, liked)
            native_content_interest(*inputs)  # [2, 5], [2, 7]
    """
    operator = "content_interest"
    vectors = as_float32(operator, queries=queries, items=items, map=map_)
    places = as_int64(operator, index=index, offsets=offsets)
    lists = as_float32(operator, of_lists=of_lists, parallel=parallel)
    sums, features, *_ = torch.ops.recsys.content_interest(*vectors, *places, *lists)
    return sums, features


@torch.library.register_fake("recsys::content_interest")
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


@torch.library.register_fake("recsys::content_interest_backward")
def _fake_backward(*inputs: Tensor) -> tuple[Tensor, ...]:
    *_, queries, _, map_, _, _, of_lists, _ = inputs
    return tuple(part.new_empty(part.shape) for part in (queries, map_, of_lists))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    refuse_gradient("content_interest", items=inputs[1], parallel=inputs[6])
    kept = output[2:]
    ctx.save_for_backward(*kept, *inputs)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # no zeros for what is kept
    ctx.widths = [part.shape[1] for part in output[:2]]


def _backward(
    ctx: Any, of_sums: Tensor | None, of_features: Tensor | None, *of_kept: None
) -> tuple[Tensor | None, ...]:
    del of_kept
    queries = ctx.saved_tensors[3]
    of_outputs = [
        queries.new_zeros(queries.shape[0], width) if gradient is None else gradient
        for gradient, width in zip((of_sums, of_features), ctx.widths)
    ]
    of_queries, of_map, of_lists = torch.ops.recsys.content_interest_backward(
        *of_outputs, *ctx.saved_tensors
    )
    return (of_queries, None, of_map, None, None, of_lists, None)


torch.library.register_autograd("recsys::content_interest", _backward, setup_context=_save)
refuse_second_derivative("content_interest")
