"""Operator `recsys::few_token_attention`: attention among the few tokens of each item.

`scaled_dot_product_attention` is made for long texts: for four tokens its preparation takes longer
than the products. The C++ kernel computes one item after the other in cache and writes nothing but
its output and the weights.

Shapes: U unique items, Q queries, T tokens, D dimension, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys.kernels.checks import as_float32, refuse_second_derivative

torch.library.define(
    "recsys::few_token_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor mask, int heads, float scale) "
    "-> (Tensor, Tensor)",
)
torch.library.define(
    "recsys::few_token_attention_backward",
    "(Tensor gradient, Tensor weights, Tensor query, Tensor key, Tensor value, int heads, "
    "float scale) -> (Tensor, Tensor, Tensor)",
)


def native_few_token_attention(
    query: Tensor,  # [U, Q, D], mapped; a head has D / H consecutive numbers
    key: Tensor,  # [U, T, D]
    value: Tensor,  # [U, T, D]
    mask: Tensor,  # bool [U, T]
    heads: int,
    scale: float,  # factor of the dot products
) -> Tensor:  # [U, Q, D]
    """Return multi-head attention of the queries to the tokens that the mask keeps.

    Each item has a token that the mask keeps. The result has the type of the query.

    Raises:
        ValueError: a vector is of a type that kernels do not read.

    Example::

        import torch
        from recsys.kernels import has_native, native_few_token_attention

        tokens, mask = torch.rand(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
        if has_native(tokens):
            native_few_token_attention(tokens, tokens, tokens, mask, 2, 0.5)  # [2, 3, 8]
    """
    vectors = as_float32("few_token_attention", query=query, key=key, value=value)
    attended: Tensor = torch.ops.recsys.few_token_attention(*vectors, mask, heads, scale)[0]
    return attended.to(query.dtype)


@torch.library.register_fake("recsys::few_token_attention")
def _fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    del value, mask, scale
    weights = query.new_empty(query.shape[0], query.shape[1], heads, key.shape[1])
    return query.new_empty(query.shape), weights


@torch.library.register_fake("recsys::few_token_attention_backward")
def _fake_backward(*inputs: Any) -> tuple[Tensor, ...]:
    _, _, query, key, value, *_ = inputs
    return tuple(part.new_empty(part.shape) for part in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, _, ctx.heads, ctx.scale = inputs
    ctx.save_for_backward(output[1], query, key, value)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for what is kept


def _backward(ctx: Any, gradient: Tensor | None, of_weights: None) -> tuple[Tensor | None, ...]:
    del of_weights
    if gradient is None:  # of a result that nothing reads
        return (None,) * 6
    gradients = torch.ops.recsys.few_token_attention_backward(
        gradient, *ctx.saved_tensors, ctx.heads, ctx.scale
    )
    return (*gradients, None, None, None)


torch.library.register_autograd("recsys::few_token_attention", _backward, setup_context=_save)
refuse_second_derivative("few_token_attention")
