"""Triton kernels of target attention: forward per row, and backward per group of rows.

The layers are those of `triton_attention_layers`; the backward computes them again. Imported only
where triton is installed. Arguments stand several on a line: a kernel has dozens.

Shapes: B rows, N history items, D dimension, P parallel lists, H and G units, T items of a block.
Sizes in capitals with _P are padded to powers of two.
"""
# fmt: off

from __future__ import annotations

import triton
import triton.language as tl

from recsys.kernels.triton_attention_layers import (
    first_layer,
    load_block,
    load_vectors,
    second_layer,
)


@triton.jit
def forward(  # type: ignore[no-untyped-def]
    targets, items, index, offsets, parallel, lists, of_items, of_products, of_target, bias,
    second, second_bias, last, out, shares, D, H, G, P,
    T: tl.constexpr, D_P: tl.constexpr, H_T: tl.constexpr, G_P: tl.constexpr,
):
    """Write a row's interest, and the share of each of its places."""
    row = tl.program_id(0)
    d, g, t = tl.arange(0, D_P), tl.arange(0, G_P), tl.arange(0, T)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    target = tl.load(targets + row * D + d, mask=d < D, other=0.0)
    of_units = tl.load(last + g, mask=g < G, other=0.0)
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    interest = tl.zeros([D_P], tl.float32)
    for first in range(begin, end, T):
        vectors = load_vectors(items, index, parallel, lists, first, end, D, P, T, D_P)
        units = second_layer(
            vectors, target, of_items, of_products, of_target, bias, second, second_bias,
            D, H, G, T, D_P, H_T, G_P,
        )
        inside = first + t < end
        scores = tl.where(inside, tl.sum(units * of_units[None, :], axis=1), float("-inf"))
        tl.store(shares + first + t, scores, mask=inside)
        higher = tl.maximum(highest, tl.max(scores, axis=0))
        scale = tl.exp(highest - higher)
        weights = tl.exp(scores - higher)
        total = total * scale + tl.sum(weights, axis=0)
        interest = interest * scale + tl.sum(weights[:, None] * vectors, axis=0)
        highest = higher
    interest = interest / tl.where(total > 0, total, 1.0)
    tl.store(out + row * D + d, interest, mask=d < D)
    tl.debug_barrier()
    for first in range(begin, end, T):
        inside = first + t < end
        scores = tl.load(shares + first + t, mask=inside, other=0.0)
        tl.store(shares + first + t, tl.exp(scores - highest) / total, mask=inside)


@triton.jit
def add_to(pointer, value, mask):  # type: ignore[no-untyped-def]
    """Add to memory that this program alone writes."""
    tl.store(pointer, tl.load(pointer, mask=mask, other=0.0) + value, mask=mask)
    tl.debug_barrier()


@triton.jit
def mean_gradient(  # type: ignore[no-untyped-def]
    items, index, parallel, lists, shares, of_out, begin, end, D, P,
    T: tl.constexpr, D_P: tl.constexpr,
):
    """Return the mean, by share, of the dot products of a row's vectors with the gradient."""
    mean = tl.zeros([], tl.float32)
    for first in range(begin, end, T):
        vectors = load_vectors(items, index, parallel, lists, first, end, D, P, T, D_P)
        n = first + tl.arange(0, T)
        share = tl.load(shares + n, mask=n < end, other=0.0)
        mean += tl.sum(share * tl.sum(vectors * of_out[None, :], axis=1), axis=0)
    return mean


@triton.jit
def block_backward(  # type: ignore[no-untyped-def]
    vectors, target, of_second, of_vectors, of_row, of_items, of_products, of_target, bias, second,
    for_items, for_products, for_constant, for_second, D, H, G,
    D_P: tl.constexpr, H_T: tl.constexpr, G_P: tl.constexpr,
):
    """Add the gradients of both layers' weights; return those of vectors and of the target."""
    d, g = tl.arange(0, D_P), tl.arange(0, G_P)
    for start in range(0, H, H_T):
        hidden, matrix = first_layer(
            vectors, target, of_items, of_products, of_target, bias, start, D, H, D_P, H_T
        )
        h = start + tl.arange(0, H_T)
        place = h[:, None] * G + g[None, :]
        inside = (h < H)[:, None] & (g < G)[None, :]
        weight = tl.load(second + place, mask=inside, other=0.0)
        of_weight = tl.dot(tl.trans(hidden), of_second, input_precision="ieee")
        add_to(for_second + place, of_weight, inside)
        of_hidden = tl.dot(of_second, tl.trans(weight), input_precision="ieee")
        of_hidden = tl.where(hidden <= 0, 0.0, of_hidden)
        of_vectors += tl.dot(of_hidden, tl.trans(matrix), input_precision="ieee")
        of_matrix = tl.dot(tl.trans(vectors), of_hidden, input_precision="ieee")
        place = d[:, None] * H + h[None, :]
        inside = (d < D)[:, None] & (h < H)[None, :]
        add_to(for_items + place, of_matrix, inside)
        add_to(for_products + place, target[:, None] * of_matrix, inside)
        of_row += tl.sum(of_matrix * load_block(of_products, start, D, H, D_P, H_T), axis=1)
        add_to(for_constant + h, tl.sum(of_hidden, axis=0), h < H)
    return of_vectors, of_row


@triton.jit
def row_backward(  # type: ignore[no-untyped-def]
    row, begin, end, gradient, shares, targets, items, index, parallel, lists,
    of_items, of_products, of_target, bias, second, second_bias, last, for_target, for_places,
    for_items, for_products, for_constants, for_second, for_second_bias, for_last, D, H, G, P,
    T: tl.constexpr, D_P: tl.constexpr, H_T: tl.constexpr, G_P: tl.constexpr,
):
    """Write the gradients of a row's target and places, and add those of the weights."""
    d, g = tl.arange(0, D_P), tl.arange(0, G_P)
    target = tl.load(targets + row * D + d, mask=d < D, other=0.0)
    of_out = tl.load(gradient + row * D + d, mask=d < D, other=0.0)
    of_units = tl.load(last + g, mask=g < G, other=0.0)
    mean = mean_gradient(items, index, parallel, lists, shares, of_out, begin, end, D, P, T, D_P)
    of_row = tl.zeros([D_P], tl.float32)
    for first in range(begin, end, T):
        vectors = load_vectors(items, index, parallel, lists, first, end, D, P, T, D_P)
        n = first + tl.arange(0, T)
        share = tl.load(shares + n, mask=n < end, other=0.0)
        of_score = share * (tl.sum(vectors * of_out[None, :], axis=1) - mean)
        units = second_layer(
            vectors, target, of_items, of_products, of_target, bias, second, second_bias,
            D, H, G, T, D_P, H_T, G_P,
        )
        add_to(for_last + g, tl.sum(of_score[:, None] * units, axis=0), g < G)
        of_second = tl.where(units <= 0, 0.0, of_score[:, None] * of_units[None, :])
        add_to(for_second_bias + g, tl.sum(of_second, axis=0), g < G)
        of_vectors, of_row = block_backward(
            vectors, target, of_second, share[:, None] * of_out[None, :], of_row,
            of_items, of_products, of_target, bias, second,
            for_items, for_products, for_constants + row * H, for_second, D, H, G, D_P, H_T, G_P,
        )
        place = n[:, None] * D + d[None, :]
        tl.store(for_places + place, of_vectors, mask=(n < end)[:, None] & (d < D)[None, :])
    tl.store(for_target + row * D + d, of_row, mask=d < D)


@triton.jit
def backward(  # type: ignore[no-untyped-def]
    gradient, shares, targets, items, index, offsets, parallel, lists,
    of_items, of_products, of_target, bias, second, second_bias, last, for_target, for_places,
    for_items, for_products, for_constants, for_second, for_second_bias, for_last,
    B, D, H, G, P, rows_of_group,
    T: tl.constexpr, D_P: tl.constexpr, H_T: tl.constexpr, G_P: tl.constexpr,
):
    """Sum the gradients of weights over a group of rows, in a part of memory of its own.

    `for_constants` [B, H] gets the gradient of each row's constant; `for_second` is [group, H, G].
    """
    group = tl.program_id(0)
    for row in range(group * rows_of_group, tl.minimum((group + 1) * rows_of_group, B)):
        row_backward(
            row, tl.load(offsets + row), tl.load(offsets + row + 1),
            gradient, shares, targets, items, index, parallel, lists,
            of_items, of_products, of_target, bias, second, second_bias, last,
            for_target, for_places, for_items + group * D * H, for_products + group * D * H,
            for_constants, for_second + group * H * G, for_second_bias + group * G,
            for_last + group * G, D, H, G, P, T, D_P, H_T, G_P,
        )
