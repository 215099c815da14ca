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
) -> Tensor:  # [B, D]
    """Return the interest of each row in the history; `score` is an MLP with ReLU.

    Its input is (item, target, difference, product); `lists` maps `parallel` to a summand of items.
    """
    layers = [layer for layer in score if isinstance(layer, nn.Linear)]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    interest: Tensor = torch.ops.recsys.shared_target_attention(
        target, items, parallel, lists, weights, biases
    )
    return interest


def _compute(
    target: Tensor,
    items: Tensor,
    parallel: Tensor,
    lists: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> Tensor:
    is_small = len(weights) == NATIVE_LAYERS and weights[0].shape[0] <= MAX_UNITS
    inputs = [target, items, parallel, lists, *weights, *biases]
    if not is_small or any(part.dtype != torch.float32 for part in inputs) or not has_built(target):
        return shared_reference(target, items, parallel, lists, weights, biases)
    (num_rows, _), length = target.shape, items.shape[0]
    index = torch.arange(length).repeat(num_rows)
    offsets = torch.arange(num_rows + 1) * length
    parameters = [part.contiguous() for pair in zip(weights, biases) for part in pair]
    vectors = target.contiguous(), items.contiguous(), index, offsets, parallel.repeat(num_rows, 1)
    interest: Tensor = torch.ops.recsys.target_attention(
        *vectors, lists.contiguous(), *parameters, False, False
    )[0]
    return interest


def shared_reference(
    target: Tensor,
    items: Tensor,
    parallel: Tensor,
    lists: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> Tensor:
    """Return the same by PyTorch: the first layer is one product of all rows and items."""
    vectors = items + parallel.to(items.dtype) @ lists.T
    w_item, w_target, w_difference, w_product = weights[0].chunk(4, dim=1)  # [H, D]
    constant = torch.addmm(biases[0], vectors, (w_item + w_difference).T)  # [L, H]
    factors = vectors.T.unsqueeze(2) * w_product.T.unsqueeze(1)  # [D, L, H]
    factors = factors + (w_target - w_difference).T.unsqueeze(1)
    # The constant is one more row of the factors: else it is copied to all rows first.
    factors = torch.cat([factors.flatten(1), constant.view(1, -1)])
    hidden = F.pad(target, (0, 1), value=1.0) @ factors  # [B, L * H]
    hidden = hidden.view(-1, constant.shape[1])
    for weight, bias in zip(weights[1:], biases[1:]):
        hidden = F.linear(hidden.relu_(), weight, bias)
    scores = hidden.view(target.shape[0], items.shape[0])
    return scores.softmax(dim=1) @ vectors


def _fake(target: Tensor, *rest: object) -> Tensor:
    del rest
    return target.new_empty(target.shape)


torch.library.define(NAME, f"({SCHEMA}Tensor[] biases) -> Tensor")
torch.library.impl(NAME, "CompositeExplicitAutograd", _compute)
torch.library.register_fake(NAME, _fake)
