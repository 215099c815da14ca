"""Operator `recsys::target_attention`: the target attention of DIN over jagged histories.

The score's first layer is one matrix per row, M_b = (W1 + W3) + W4 diag(t). Results are equal to
the last bit in every run and for any number of threads.
Shapes: B batch, U unique items, N history items of the batch, D dimension, P parallel lists, H and
G units of the two hidden layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recsys.kernels.choice import rounds_products
from recsys.kernels.operators import Operator, as_float32, as_int64, result_dtype

MAX_UNITS = 512
MAX_UNIT_BYTES = 16 * 2**20  # of units kept for the backward: larger blocks are not reused
_INPUTS = (
    "Tensor target, Tensor items, Tensor index, Tensor offsets, Tensor parallel, Tensor lists, "
    "Tensor first, Tensor first_bias, Tensor second, Tensor second_bias, Tensor last"
)


class ScoreWeights(NamedTuple):
    """Weights of the MLP that scores an item, as `torch.nn.Linear` has them.

    first: [H, 4 * D], of (item, target, difference, product); second: [G, H]; last: [1, G].
    """

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    last: Tensor
    last_bias: Tensor

    @staticmethod
    def of(score: nn.Sequential) -> ScoreWeights | None:
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
    places = as_int64("target_attention", index=index, offsets=offsets)
    interest: Tensor = torch.ops.recsys.target_attention(
        *floats[:2], *places, *floats[2:], keeps_units, rounds_products(target.device)
    )[0]
    return interest.to(result_dtype(target, items, score.first))


def _units_row(first: Tensor, second: Tensor) -> int:  # [H, 4 D], [G, H]
    """Return the floats of a row of saved units: both layers up to the ends of cache lines."""
    return sum((layer.shape[:1].numel() + 15) // 16 * 16 for layer in (first, second))


def _fake(
    target: Tensor, items: Tensor, index: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    del items
    *_, first, _, second, _, _, _, keeps_units, _ = rest
    units = _units_row(first, second) if keeps_units else 0
    shares, saved = target.new_empty(index.shape), target.new_empty(index.shape[0], units)
    return target.new_empty(target.shape), shares, saved


Operator(
    "target_attention",
    inputs=f"{_INPUTS}, Tensor last_bias, bool keeps_units, bool bfloat16",
    backward_inputs=f"Tensor gradient, Tensor shares, Tensor kept, {_INPUTS}, bool bfloat16",
    gradients=(
        *("target", "items", "lists"),
        *("first", "first_bias", "second", "second_bias", "last"),
    ),
    num_outputs=3,
    zero_gradients=("last_bias",),  # a softmax does not change if all its scores do
    without_gradient=("parallel",),
).define(_fake)
