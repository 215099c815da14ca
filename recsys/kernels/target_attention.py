"""Target attention of DIN: `recsys::target_attention`, and `shared_target_attention` of packages.

The first is over jagged histories. The score's first layer is one matrix per row, M_b = (W1 + W3) +
W4 diag(t). Results are equal to the last bit in every run and for any number of threads.
Graphs of packages, whose rows all have one history, call the second, which has no gradient. It uses
the kernel if it is already compiled, and else PyTorch, so that a server waits for no compiler.
Shapes: B batch, U unique items, N history items of the batch, D dimension, P parallel lists, H and
G units of the two hidden layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.kernels.choice import has_built
from recsys.kernels.operators import Operator, as_float32, as_int64, result_dtype, rounds_products

MAX_UNITS = 512
MAX_UNIT_BYTES = 16 * 2**20  # of units saved for the backward: larger blocks are not reused
_INPUTS = (
    "Tensor target, Tensor items, Tensor index, Tensor offsets, Tensor parallel, Tensor lists, "
    "Tensor first, Tensor first_bias, Tensor second, Tensor second_bias, Tensor last"
)


class ScoreWeights(NamedTuple):
    """Weights of the MLP that scores an item, as `torch.nn.Linear` has them."""

    first: Tensor  # [H, 4 * D], of (item, target, difference, product)
    first_bias: Tensor
    second: Tensor  # [G, H]
    second_bias: Tensor
    last: Tensor  # [1, G]
    last_bias: Tensor

    @staticmethod
    def from_layers(score: nn.Sequential) -> ScoreWeights | None:
        """Return the weights of Linear, ReLU, Linear, ReLU, Linear; None for other layers."""
        if refusal(score) is not None:
            return None
        first, second, last = (layer for layer in score if isinstance(layer, nn.Linear))
        return ScoreWeights(
            first.weight, first.bias, second.weight, second.bias, last.weight, last.bias
        )


def refusal(score: nn.Sequential) -> str | None:
    """Return why no kernel computes the scores of this MLP, or None."""
    units = [layer.out_features for layer in score if isinstance(layer, nn.Linear)][:-1]
    if len(units) == 2 and units[0] <= MAX_UNITS:
        return None
    return f"attention_units are {units}; give two, the first at most {MAX_UNITS}"


def native_target_attention(
    target: Tensor,  # [B, D]
    items: Tensor,  # [U, D]
    index: Tensor,  # int64 [N]
    offsets: Tensor,  # int64 [B + 1]
    parallel: Tensor,  # [N, P]
    lists: Tensor,  # [D, P]
    score: ScoreWeights,
) -> Tensor:  # [B, D]
    """Return the interest of each row in its history, by a kernel.

    The result is float32 under autocast, and else of the widest type of targets, items and weights.
    `index` has the items, row by row; `lists` maps `parallel`, which gets no gradient.
    """
    unit_bytes = 4 * index.numel() * _units_row(score.first, score.second)
    keeps_units = torch.is_grad_enabled() and unit_bytes <= MAX_UNIT_BYTES
    vectors = {"target": target, "items": items, "parallel": parallel, "lists": lists}
    floats = as_float32("target_attention", **vectors, **score._asdict())
    indices = as_int64("target_attention", index=index, offsets=offsets)
    interest: Tensor = torch.ops.recsys.target_attention(
        *floats[:2], *indices, *floats[2:], keeps_units, rounds_products(target.device)
    )[0]
    return interest.to(result_dtype(target, items, score.first))


def _units_row(first: Tensor, second: Tensor) -> int:  # [H, 4 D], [G, H]
    """Return the floats of a row of saved units: both layers up to the ends of cache lines."""
    return sum((layer.shape[:1].numel() + 15) // 16 * 16 for layer in (first, second))


def _fake(target: Tensor, items: Tensor, index: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, first, _, second, _, _, _, keeps_units, _ = others
    units = _units_row(first, second) if keeps_units else 0
    shares, saved = target.new_empty(index.shape), target.new_empty(index.shape[0], units)
    return target.new_empty(target.shape), shares, saved


Operator(
    "target_attention",
    inputs=f"{_INPUTS}, Tensor last_bias, bool keeps_units, bool bfloat16",
    backward_inputs=f"Tensor gradient, Tensor shares, Tensor kept, {_INPUTS}, bool bfloat16",
    gradients=("target", "items", "lists", "first", "first_bias", "second", "second_bias", "last"),
    num_outputs=3,
    zero_gradients=("last_bias",),  # a softmax does not change if all its scores do
    without_gradient=("parallel",),
).define(_fake)


SHARED = "recsys::shared_target_attention"
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
    """Return the interest of each row in the history of L items; `score` is an MLP with ReLU.

    Its input is (item, target, difference, product); `lists` maps `parallel` to a summand of items.
    With `bfloat16` the factors of its products are rounded to bfloat16.
    """
    layers = [layer for layer in score if isinstance(layer, nn.Linear)]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return torch.ops.recsys.shared_target_attention(
        target, items, parallel, lists, weights, biases, bfloat16
    )


def _compute(
    target: Tensor,
    items: Tensor,
    parallel: Tensor,
    lists: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bfloat16: bool = False,
) -> Tensor:
    vectors = items + parallel.to(items.dtype) @ lists.T  # [L, D]
    is_small = len(weights) == NATIVE_LAYERS and weights[0].shape[0] <= MAX_UNITS
    inputs = [target, vectors, *weights, *biases]
    if is_small and all(tensor.dtype == torch.float32 for tensor in inputs) and has_built(target):
        # A softmax does not change if all its scores do, so the last bias is left out.
        (first, second, last), (first_bias, second_bias, _) = weights, biases
        return torch.ops.recsys.attention_to_shared(
            target, vectors, first, first_bias, second, second_bias, last, bfloat16
        )
    # The first layer is one product of all rows and items.
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


def _fake_shared(target: Tensor, *_: object) -> Tensor:
    return target.new_empty(target.shape)


torch.library.define(SHARED, f"({SCHEMA}Tensor[] biases, bool bfloat16=False) -> Tensor")
torch.library.impl(SHARED, "CompositeExplicitAutograd", _compute)
torch.library.register_fake(SHARED, _fake_shared)
torch.library.define(
    "recsys::attention_to_shared",
    "(Tensor target, Tensor items, Tensor first, Tensor first_bias, Tensor second, "
    "Tensor second_bias, Tensor last, bool bfloat16) -> Tensor",
)
