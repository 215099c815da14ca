"""Operator `recsys::shared_target_attention`: DIN's attention where all rows have one history.

Graphs of packages call it. It is the kernel of `recsys::target_attention` where that is compiled,
and PyTorch elsewhere: a server never waits for a compiler. It has no gradient.
Shapes: B rows, L history items, D dimension, P parallel lists, H units of the first layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.kernels.choice import has_built
from recsys.kernels.target_attention import MAX_UNITS

NAME = "recsys::shared_target_attention"
SCHEMA = "Tensor target, Tensor items, Tensor parallel, Tensor lists, Tensor[] weights, "
NATIVE_LAYERS = 3  # two hidden layers, and the score


def shared_target_attention(
    target: Tensor,  # [B, D]
    items: Tensor,  # [L, D]
    parallel: Tensor,  # [L, P]
    lists: Tensor,  # [D, P]
    score: nn.Sequential,
    bfloat16: bool = False,
) -> Tensor:  # [B, D]
    """Return the interest of each row in the history; `score` is an MLP with ReLU.

    Its input is (item, target, difference, product); `lists` maps `parallel` to a summand of items.
    With `bfloat16` the factors of its products are rounded to bfloat16.
    """
    layers = [layer for layer in score if isinstance(layer, nn.Linear)]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    interest: Tensor = torch.ops.recsys.shared_target_attention(
        target, items, parallel, lists, weights, biases, bfloat16
    )
    return interest


def _compute(
    target: Tensor,
    items: Tensor,
    parallel: Tensor,
    lists: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bfloat16: bool = False,
) -> Tensor:
    vectors = items + parallel.to(items.dtype) @ lists.T
    is_small = len(weights) == NATIVE_LAYERS and weights[0].shape[0] <= MAX_UNITS
    inputs = [target, vectors, *weights, *biases]
    if not is_small or any(part.dtype != torch.float32 for part in inputs) or not has_built(target):
        return shared_reference(target, vectors, weights, biases, bfloat16)
    # A softmax does not change if all its scores do, so the last bias is left out.
    (first, second, last), (first_bias, second_bias, _) = weights, biases
    interest: Tensor = torch.ops.recsys.attention_to_shared(
        target, vectors, first, first_bias, second, second_bias, last, bfloat16
    )
    return interest


def shared_reference(
    target: Tensor,  # [B, D]
    vectors: Tensor,  # [L, D]
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bfloat16: bool,
) -> Tensor:  # [B, D]
    """Return the same by PyTorch: the first layer is one product of all rows and items."""
    w_item, w_target, w_difference, w_product = weights[0].chunk(4, dim=1)  # [H, D]
    constant = torch.addmm(biases[0], vectors, (w_item + w_difference).T)  # [L, H]
    factors = vectors.T.unsqueeze(2) * w_product.T.unsqueeze(1)  # [D, L, H]
    factors = factors + (w_target - w_difference).T.unsqueeze(1)
    # The constant is one more row of the factors: else it is copied to all rows first.
    factors = torch.cat([factors.flatten(1), constant.view(1, -1)])
    dtype = torch.bfloat16 if bfloat16 else target.dtype
    hidden = F.pad(target, (0, 1), value=1.0).to(dtype) @ factors.to(dtype)  # [B, L * H]
    hidden = hidden.view(-1, constant.shape[1])
    for weight, bias in zip(weights[1:], biases[1:]):
        hidden = F.linear(hidden.relu_(), weight.to(dtype), bias.to(dtype))
    scores = hidden.view(target.shape[0], vectors.shape[0]).to(target.dtype)
    return scores.softmax(dim=1) @ vectors


def _fake(target: Tensor, *rest: object) -> Tensor:
    del rest
    return target.new_empty(target.shape)


torch.library.define(NAME, f"({SCHEMA}Tensor[] biases, bool bfloat16=False) -> Tensor")
torch.library.impl(NAME, "CompositeExplicitAutograd", _compute)
torch.library.register_fake(NAME, _fake)
torch.library.define(
    "recsys::attention_to_shared",
    "(Tensor target, Tensor items, Tensor first, Tensor first_bias, Tensor second, "
    "Tensor second_bias, Tensor last, bool bfloat16) -> Tensor",
)
