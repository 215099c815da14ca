"""Operator `recsys::fusion`: the Fusion-Q-Former of preset `modern`.

Shapes: U unique items, T tokens of an item, Q queries, M modalities, D dimension, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recsys.kernels.choice import rounds_products
from recsys.kernels.operators import Operator, as_float32, as_int64, result_dtype, row_stride

_INPUTS = (
    "Tensor tokens, Tensor mask, Tensor modality, Tensor noise, Tensor[] weights, int layers, "
    "int heads, float scale, float dropout, bool bfloat16"
)
_WEIGHTS_OF_LAYER, _UP = 16, 12  # place of the map from D to the hidden units


def native_fusion(
    tokens: Tensor,  # [U, T, D]
    mask: Tensor,  # bool [U, T], False for a token that an item lacks
    modality: Tensor,  # int64 [T]
    noise: Tensor,
    weights: Sequence[Tensor],
    layers: int,
    heads: int,  # H, which divides D
    scale: float,  # factor of the dot products
    dropout: float,  # probability, after attention and after the feed-forward network
) -> Tensor:  # [U, D]
    """Return one vector per item, of autocast's type or else the widest of tokens and weights.

    `noise` has the uniform numbers of the dropouts, one after the other; a number below
    `dropout` drops. `weights` are `FusionQFormer.weights()`.
    """
    named_weights = {f"weights[{place}]": weight for place, weight in enumerate(weights)}
    vectors, *parts = as_float32("fusion", tokens=tokens, **named_weights)
    (modalities,) = as_int64("fusion", modality=modality)
    inputs = vectors, mask, modalities, noise.float(), parts, layers, heads, scale, dropout
    fused: Tensor = torch.ops.recsys.fusion(*inputs, rounds_products(tokens.device))[0]
    device = tokens.device.type
    if torch.is_autocast_enabled(device):
        return fused.to(torch.get_autocast_dtype(device))  # as its last operation would
    return fused.to(result_dtype(tokens, *weights[:1]))


def _fake(tokens: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, _, weights, layers, heads, *_ = rest
    dim, queries = tokens.shape[2], weights[0].shape[0]
    rows, num_saved = queries + tokens.shape[1], queries * dim
    for layer in range(layers):
        outputs = rows if layer + 1 < layers else queries
        units = weights[2 + layer * _WEIGHTS_OF_LAYER + _UP].shape[0]
        num_saved += rows * dim + 2 * (rows + outputs) * row_stride(dim)
        num_saved += outputs * (row_stride(units) + heads * rows)
    return tokens.new_empty(tokens.shape[0], dim), tokens.new_empty(tokens.shape[0] * num_saved)


Operator(
    "fusion",
    inputs=_INPUTS,
    backward_inputs=f"Tensor gradient, Tensor kept, {_INPUTS}",
    gradients=("tokens", "weights"),
    num_outputs=2,
).define(_fake)
