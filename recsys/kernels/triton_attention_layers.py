"""The layers of target attention in Triton: gathered vectors, and the units of both layers.

The mathematics is that of `cpp/attention.h`: M_b = W_h + W_p diag(t), in blocks of H columns.
Weights stand transposed, inputs first. Imported only where triton is installed.

Shapes: N history items, D dimension, P parallel lists, H and G units, T items of a block. Sizes in
capitals with _P are padded to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_vectors(
    items, index, parallel, lists, first, end, D, P, T: tl.constexpr, D_P: tl.constexpr
):  # type: ignore[no-untyped-def]
    """Return the vectors [T, D_P] of places first to first + T, with their lists' vectors added."""
    n = first + tl.arange(0, T)
    d = tl.arange(0, D_P)
    inside = n < end
    item = tl.load(index + n, mask=inside, other=0)
    mask = inside[:, None] & (d < D)[None, :]
    vectors = tl.load(items + item[:, None] * D + d[None, :], mask=mask, other=0.0)
    for p in range(P):
        value = tl.load(parallel + n * P + p, mask=inside, other=0.0)
        vectors += value[:, None] * tl.load(lists + p * D + d, mask=d < D, other=0.0)[None, :]
    return vectors


@triton.jit
def load_block(weight, start, D, H, D_P: tl.constexpr, H_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return columns start to start + H_T of a weight [D, H]."""
    d = tl.arange(0, D_P)[:, None]
    h = start + tl.arange(0, H_T)[None, :]
    return tl.load(weight + d * H + h, mask=(d < D) & (h < H), other=0.0)


@triton.jit
def relu(units):  # type: ignore[no-untyped-def]
    """Return the units, 0 where they are negative. As in PyTorch NaN stays NaN."""
    return tl.where(units <= 0, 0.0, units)


@triton.jit
def first_layer(  # type: ignore[no-untyped-def]
    vectors, target, of_items, of_products, of_target, bias, start, D, H,
    D_P: tl.constexpr, H_T: tl.constexpr,
):  # fmt: skip
    """Return units start to start + H_T of the first layer [T, H_T], and the matrix [D_P, H_T]."""
    h = start + tl.arange(0, H_T)
    matrix = load_block(of_items, start, D, H, D_P, H_T)
    matrix += target[:, None] * load_block(of_products, start, D, H, D_P, H_T)
    constant = tl.sum(target[:, None] * load_block(of_target, start, D, H, D_P, H_T), axis=0)
    constant += tl.load(bias + h, mask=h < H, other=0.0)
    hidden = tl.dot(vectors, matrix, input_precision="ieee") + constant[None, :]
    return relu(hidden), matrix


@triton.jit
def second_layer(  # type: ignore[no-untyped-def]
    vectors, target, of_items, of_products, of_target, bias, second, second_bias, D, H, G,
    T: tl.constexpr, D_P: tl.constexpr, H_T: tl.constexpr, G_P: tl.constexpr,
):  # fmt: skip
    """Return the units of the second layer [T, G_P]; `second` is [H, G]."""
    g = tl.arange(0, G_P)
    units = tl.zeros([T, G_P], tl.float32)
    for start in range(0, H, H_T):
        hidden, _ = first_layer(
            vectors, target, of_items, of_products, of_target, bias, start, D, H, D_P, H_T
        )
        h = (start + tl.arange(0, H_T))[:, None]
        weight = tl.load(second + h * G + g[None, :], mask=(h < H) & (g < G)[None, :], other=0.0)
        units += tl.dot(hidden, weight, input_precision="ieee")
    return relu(units + tl.load(second_bias + g, mask=g < G, other=0.0)[None, :])
