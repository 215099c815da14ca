"""Operator `recsys::fusion`: the Fusion-Q-Former, preset `modern`.

It is 70 small operations on tensors of some thousand rows, and its backward twice as many. The C++
kernel computes a block of items, from their tokens to their vectors, whose rows stay in cache.

Shapes: U unique items, T tokens of an item, Q queries, M modalities, D dimension, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recsys.kernels.checks import (
    as_float32,
    as_int64,
    refuse_second_derivative,
    result_dtype,
)
from recsys.kernels.choice import rounds_products

_INPUTS = (
    "Tensor tokens, Tensor mask, Tensor modality, Tensor noise, Tensor[] weights, int layers, "
    "int heads, float scale, float dropout, bool bfloat16"
)
torch.library.define("recsys::fusion", f"({_INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    "recsys::fusion_backward", f"(Tensor gradient, Tensor kept, {_INPUTS}) -> (Tensor, Tensor[])"
)

_WEIGHTS_OF_LAYER, _UP = 16, 12  # place of the map from D to the hidden units


class AttentionSettings(NamedTuple):
    """Numbers of all layers.

    layers: number of layers.
    heads: H, which divides D.
    scale: factor of the dot products.
    dropout: probability of the dropout after attention and after the feed-forward network.

    Example::

        from recsys.kernels import AttentionSettings

        AttentionSettings(layers=2, heads=4, scale=16**-0.5, dropout=0.1)
    """

    layers: int
    heads: int
    scale: float
    dropout: float


def native_fusion(
    tokens: Tensor,  # [U, T, D]
    mask: Tensor,  # bool [U, T]
    modality: Tensor,  # int64 [T]
    noise: Tensor,
    weights: Sequence[Tensor],
    settings: AttentionSettings,
) -> Tensor:  # [U, D]
    """Return one vector per item.

    Computed in float32. The result has autocast's type under autocast, and else the type of the
    tokens or the wider one of the weights.

    Args:
        tokens: tokens of items.
        mask: False for a token that an item lacks.
        modality: modality of each token.
        noise: uniform numbers of the dropouts, one after the other; a number below
            `settings.dropout` drops. Empty without dropout.
        weights: those of `FusionQFormer`, in the order of its `weights`.
        settings: numbers of the layers.

    Raises:
        ValueError: an input is of a type that kernels do not read.

    Example::

        import torch
        from recsys import FusionQFormer
        from recsys.kernels import AttentionSettings, has_native, native_fusion

        fusion = FusionQFormer(dim=8, num_modalities=2, num_heads=2)
        tokens, mask = torch.rand(3, 2, 8), torch.ones(3, 2, dtype=torch.bool)
        if has_native(tokens):
            inputs = (tokens, mask, torch.tensor([0, 1]), torch.zeros(0), fusion.weights())
            native_fusion(*inputs, AttentionSettings(1, 2, 0.5, 0.0))  # [3, 8]
    """
    named = {f"weights[{place}]": weight for place, weight in enumerate(weights)}
    (vectors,) = as_float32("fusion", tokens=tokens)
    (kinds,) = as_int64("fusion", modality=modality)
    parts = as_float32("fusion", **named)
    rounds = rounds_products(tokens.device)
    fused: Tensor = torch.ops.recsys.fusion(
        vectors, mask, kinds, noise.float(), parts, *settings, rounds
    )[0]
    device = tokens.device.type
    if torch.is_autocast_enabled(device):
        return fused.to(torch.get_autocast_dtype(device))  # as its last operation would
    return fused.to(result_dtype(tokens, *weights[:1]))


def _distance(width: int) -> int:
    """Return the distance of rows in what the forward keeps: `distance_of` of the C++ code."""
    whole = (width + 15) // 16 * 16
    return whole + 16 if whole >= 128 else whole


@torch.library.register_fake("recsys::fusion")
def _fake(tokens: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, _, weights, layers, heads, *_ = rest
    dim, queries = tokens.shape[2], weights[0].shape[0]
    rows, kept = queries + tokens.shape[1], queries * dim
    for layer in range(layers):
        outputs = rows if layer + 1 < layers else queries
        units = weights[2 + layer * _WEIGHTS_OF_LAYER + _UP].shape[0]
        kept += rows * dim + 2 * (rows + outputs) * _distance(dim)
        kept += outputs * (_distance(units) + heads * rows)
    return tokens.new_empty(tokens.shape[0], dim), tokens.new_empty(tokens.shape[0] * kept)


@torch.library.register_fake("recsys::fusion_backward")
def _fake_backward(*inputs: Any) -> tuple[Tensor, list[Tensor]]:
    _, _, tokens, _, _, _, weights, *_ = inputs
    return tokens.new_empty(tokens.shape), [weight.new_empty(weight.shape) for weight in weights]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *read, weights = inputs[:5]
    ctx.settings = inputs[5:]  # layers, heads, scale, dropout, bfloat16
    ctx.save_for_backward(output[1], *read, *weights)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for what is kept


def _backward(ctx: Any, gradient: Tensor | None, of_kept: None) -> tuple[Any, ...]:
    del of_kept
    kept, tokens, mask, modality, noise, *weights = ctx.saved_tensors
    inputs = (tokens, mask, modality, noise, weights, *ctx.settings)
    of_tokens, of_weights = None, [None] * len(weights)
    if gradient is not None:  # that of a result that is read
        of_tokens, of_weights = torch.ops.recsys.fusion_backward(gradient, kept, *inputs)
    return (of_tokens, None, None, None, of_weights, *[None] * len(ctx.settings))


torch.library.register_autograd("recsys::fusion", _backward, setup_context=_save)
refuse_second_derivative("fusion")
