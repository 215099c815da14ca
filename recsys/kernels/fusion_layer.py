"""Operator `recsys::fusion_layer`: a layer of the Fusion-Q-Former, preset `modern`.

A layer is 20 small operations on tensors of some thousand rows, and its backward twice as many. The
C++ kernel computes the layer for a block of items whose rows stay in cache.

Shapes: U unique items, S tokens of an item, R of them with outputs, D dimension, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SETTINGS = "int num_outputs, int heads, float scale, float dropout"
torch.library.define(
    "recsys::fusion_layer",
    f"(Tensor x, Tensor mask, Tensor noise, Tensor[] weights, {_SETTINGS}) -> (Tensor, Tensor)",
)
torch.library.define(
    "recsys::fusion_layer_backward",
    "(Tensor gradient, Tensor kept, Tensor x, Tensor noise, Tensor[] weights, "
    f"{_SETTINGS}) -> (Tensor, Tensor[])",
)


class LayerSettings(NamedTuple):
    """Numbers of a layer.

    num_outputs: R, the tokens whose outputs are used, an item's first ones.
    heads: H, which divides D.
    scale: factor of the dot products.
    dropout: probability of the dropout of both outputs.

    Example::

        from recsys.kernels import LayerSettings

        LayerSettings(num_outputs=2, heads=4, scale=16**-0.5, dropout=0.1)
    """

    num_outputs: int
    heads: int
    scale: float
    dropout: float


def native_fusion_layer(
    x: Tensor,  # [U, S, D]
    mask: Tensor,  # bool [U, S]
    noise: Tensor,  # [2, U, R, D], or [0]
    weights: Sequence[Tensor],
    settings: LayerSettings,
) -> Tensor:  # [U, R, D]
    """Return `x + drop(attention(norm(x)))` plus the dropped feed-forward of its norm, in float32.

    Args:
        x: tokens of items.
        mask: False for a token that is not attended to; each item has another one.
        noise: uniform numbers of the dropout after attention and of that after the feed-forward; a
            number below `settings.dropout` drops. Empty without dropout.
        weights: weight and bias of the norm, the maps of query, key, value and output, the norm
            between, and the feed-forward network's maps up and down.
        settings: numbers of the layer.

    Example::

        import torch
        from recsys.content.fusion import ModernLayer
        from recsys.kernels import LayerSettings, has_native, native_fusion_layer

        x, mask = torch.rand(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
        layer, settings = ModernLayer(8, num_heads=2, dropout=0.0), LayerSettings(1, 2, 0.5, 0.0)
        if has_native(x):
            native_fusion_layer(x, mask, torch.zeros(0), layer.weights(), settings)  # [2, 1, 8]
    """
    out: Tensor = torch.ops.recsys.fusion_layer(
        x.float(), mask, noise, [weight.float() for weight in weights], *settings
    )[0]
    return out


def _distance(width: int) -> int:
    """Return the distance of rows in what the forward keeps: `distance_of` of the C++ code."""
    whole = (width + 15) // 16 * 16
    return whole + 16 if whole >= 128 else whole


@torch.library.register_fake("recsys::fusion_layer")
def _fake(
    x: Tensor, mask: Tensor, noise: Tensor, weights: list[Tensor], num_outputs: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    del mask, noise
    items, tokens, dim = x.shape
    heads = rest[0]
    of_tokens = 2 * (tokens + num_outputs) * _distance(dim)
    of_outputs = num_outputs * (_distance(weights[12].shape[0]) + heads * tokens)
    return x.new_empty(items, num_outputs, dim), x.new_empty(items, of_tokens + of_outputs)


@torch.library.register_fake("recsys::fusion_layer_backward")
def _fake_backward(
    gradient: Tensor, kept: Tensor, x: Tensor, noise: Tensor, weights: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    del gradient, kept, noise, rest
    return x.new_empty(x.shape), [weight.new_empty(weight.shape) for weight in weights]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, noise, weights, *ctx.settings = inputs
    ctx.save_for_backward(output[1], x, noise, *weights)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for what is kept


def _backward(ctx: Any, gradient: Tensor, of_kept: None) -> tuple[Any, ...]:
    del of_kept
    kept, x, noise, *weights = ctx.saved_tensors
    of_x, of_weights = torch.ops.recsys.fusion_layer_backward(
        gradient, kept, x, noise, weights, *ctx.settings
    )
    return (of_x, None, None, of_weights, None, None, None, None)


torch.library.register_autograd("recsys::fusion_layer", _backward, setup_context=_save)
