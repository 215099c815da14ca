"""Target attention on CUDA, in Triton: forward per row, and backward per group of rows.

The mathematics is that of `cpp/attention.h`. No GPU has measured it yet.
Shapes: B rows, U unique items, N history items, D dimension, P parallel lists, H and G units,
T items of a block. Sizes in capitals with _P are padded to powers of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from recsys.kernels.operators import InputChecks

ITEMS_OF_BLOCK, UNITS_OF_BLOCK, SMALLEST = 16, 32, 16
MOST_GROUPS = 256
# Arguments stand several on a line: a kernel has dozens.
# fmt: off


@triton.jit
def load_vectors(  # type: ignore[no-untyped-def]
    items, index, parallel, lists, first, end, D, P, T: tl.constexpr, D_P: tl.constexpr
):
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
    vectors, target, w_item, w_product, w_target, bias, start, D, H,
    D_P: tl.constexpr, H_T: tl.constexpr,
):
    """Return units start to start + H_T of the first layer [T, H_T], and the matrix [D_P, H_T]."""
    h = start + tl.arange(0, H_T)
    matrix = load_block(w_item, start, D, H, D_P, H_T)
    matrix += target[:, None] * load_block(w_product, start, D, H, D_P, H_T)
    constant = tl.sum(target[:, None] * load_block(w_target, start, D, H, D_P, H_T), axis=0)
    constant += tl.load(bias + h, mask=h < H, other=0.0)
    hidden = tl.dot(vectors, matrix, input_precision="ieee") + constant[None, :]
    return relu(hidden), matrix


@triton.jit
def second_layer(  # type: ignore[no-untyped-def]
    vectors, target, w_item, w_product, w_target, bias, second, second_bias, D, H, G,
    T: tl.constexpr, D_P: tl.constexpr, H_T: tl.constexpr, G_P: tl.constexpr,
):
    """Return the units of the second layer [T, G_P]; `second` is [H, G]."""
    g = tl.arange(0, G_P)
    units = tl.zeros([T, G_P], tl.float32)
    for start in range(0, H, H_T):
        hidden, _ = first_layer(
            vectors, target, w_item, w_product, w_target, bias, start, D, H, D_P, H_T
        )
        h = (start + tl.arange(0, H_T))[:, None]
        weight = tl.load(second + h * G + g[None, :], mask=(h < H) & (g < G)[None, :], other=0.0)
        units += tl.dot(hidden, weight, input_precision="ieee")
    return relu(units + tl.load(second_bias + g, mask=g < G, other=0.0)[None, :])


@triton.jit
def forward(  # type: ignore[no-untyped-def]
    targets, items, index, offsets, parallel, lists, w_item, w_product, w_target, bias,
    second, second_bias, last, out, shares, D, H, G, P,
    T: tl.constexpr, D_P: tl.constexpr, H_T: tl.constexpr, G_P: tl.constexpr,
):
    """Write a row's interest, and the share of each of its places."""
    row = tl.program_id(0)
    d, g, t = tl.arange(0, D_P), tl.arange(0, G_P), tl.arange(0, T)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    target = tl.load(targets + row * D + d, mask=d < D, other=0.0)
    w_unit = tl.load(last + g, mask=g < G, other=0.0)
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    interest = tl.zeros([D_P], tl.float32)
    for first in range(begin, end, T):
        vectors = load_vectors(items, index, parallel, lists, first, end, D, P, T, D_P)
        units = second_layer(
            vectors, target, w_item, w_product, w_target, bias, second, second_bias,
            D, H, G, T, D_P, H_T, G_P,
        )
        inside = first + t < end
        scores = tl.where(inside, tl.sum(units * w_unit[None, :], axis=1), float("-inf"))
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
    items, index, parallel, lists, shares, d_out, begin, end, D, P,
    T: tl.constexpr, D_P: tl.constexpr,
):
    """Return the mean, by share, of the dot products of a row's vectors with the gradient."""
    mean = tl.zeros([], tl.float32)
    for first in range(begin, end, T):
        vectors = load_vectors(items, index, parallel, lists, first, end, D, P, T, D_P)
        n = first + tl.arange(0, T)
        share = tl.load(shares + n, mask=n < end, other=0.0)
        mean += tl.sum(share * tl.sum(vectors * d_out[None, :], axis=1), axis=0)
    return mean


@triton.jit
def block_backward(  # type: ignore[no-untyped-def]
    vectors, target, d_second, d_vectors, d_row, w_item, w_product, w_target, bias, second,
    for_items, for_products, for_constant, for_second, D, H, G,
    D_P: tl.constexpr, H_T: tl.constexpr, G_P: tl.constexpr,
):
    """Add the gradients of both layers' weights; return those of vectors and of the target."""
    d, g = tl.arange(0, D_P), tl.arange(0, G_P)
    for start in range(0, H, H_T):
        hidden, matrix = first_layer(
            vectors, target, w_item, w_product, w_target, bias, start, D, H, D_P, H_T
        )
        h = start + tl.arange(0, H_T)
        place = h[:, None] * G + g[None, :]
        inside = (h < H)[:, None] & (g < G)[None, :]
        weight = tl.load(second + place, mask=inside, other=0.0)
        d_weight = tl.dot(tl.trans(hidden), d_second, input_precision="ieee")
        add_to(for_second + place, d_weight, inside)
        d_hidden = tl.dot(d_second, tl.trans(weight), input_precision="ieee")
        d_hidden = tl.where(hidden <= 0, 0.0, d_hidden)
        d_vectors += tl.dot(d_hidden, tl.trans(matrix), input_precision="ieee")
        d_matrix = tl.dot(tl.trans(vectors), d_hidden, input_precision="ieee")
        place = d[:, None] * H + h[None, :]
        inside = (d < D)[:, None] & (h < H)[None, :]
        add_to(for_items + place, d_matrix, inside)
        add_to(for_products + place, target[:, None] * d_matrix, inside)
        d_row += tl.sum(d_matrix * load_block(w_product, start, D, H, D_P, H_T), axis=1)
        add_to(for_constant + h, tl.sum(d_hidden, axis=0), h < H)
    return d_vectors, d_row


@triton.jit
def row_backward(  # type: ignore[no-untyped-def]
    row, begin, end, gradient, shares, targets, items, index, parallel, lists,
    w_item, w_product, w_target, bias, second, second_bias, last, for_target, for_places,
    for_items, for_products, for_constants, for_second, for_second_bias, for_last, D, H, G, P,
    T: tl.constexpr, D_P: tl.constexpr, H_T: tl.constexpr, G_P: tl.constexpr,
):
    """Write the gradients of a row's target and places, and add those of the weights."""
    d, g = tl.arange(0, D_P), tl.arange(0, G_P)
    target = tl.load(targets + row * D + d, mask=d < D, other=0.0)
    d_out = tl.load(gradient + row * D + d, mask=d < D, other=0.0)
    w_unit = tl.load(last + g, mask=g < G, other=0.0)
    mean = mean_gradient(items, index, parallel, lists, shares, d_out, begin, end, D, P, T, D_P)
    d_row = tl.zeros([D_P], tl.float32)
    for first in range(begin, end, T):
        vectors = load_vectors(items, index, parallel, lists, first, end, D, P, T, D_P)
        n = first + tl.arange(0, T)
        share = tl.load(shares + n, mask=n < end, other=0.0)
        d_score = share * (tl.sum(vectors * d_out[None, :], axis=1) - mean)
        units = second_layer(
            vectors, target, w_item, w_product, w_target, bias, second, second_bias,
            D, H, G, T, D_P, H_T, G_P,
        )
        add_to(for_last + g, tl.sum(d_score[:, None] * units, axis=0), g < G)
        d_second = tl.where(units <= 0, 0.0, d_score[:, None] * w_unit[None, :])
        add_to(for_second_bias + g, tl.sum(d_second, axis=0), g < G)
        d_vectors, d_row = block_backward(
            vectors, target, d_second, share[:, None] * d_out[None, :], d_row,
            w_item, w_product, w_target, bias, second,
            for_items, for_products, for_constants + row * H, for_second, D, H, G, D_P, H_T, G_P,
        )
        place = n[:, None] * D + d[None, :]
        tl.store(for_places + place, d_vectors, mask=(n < end)[:, None] & (d < D)[None, :])
    tl.store(for_target + row * D + d, d_row, mask=d < D)


@triton.jit
def backward(  # type: ignore[no-untyped-def]
    gradient, shares, targets, items, index, offsets, parallel, lists,
    w_item, w_product, w_target, bias, second, second_bias, last, for_target, for_places,
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
            w_item, w_product, w_target, bias, second, second_bias, last,
            for_target, for_places, for_items + group * D * H, for_products + group * D * H,
            for_constants, for_second + group * H * G, for_second_bias + group * G,
            for_last + group * G, D, H, G, P, T, D_P, H_T, G_P,
        )


def _weights(first: Tensor, second: Tensor) -> list[Tensor]:
    """Return W_h, W_p and W_t [D, H] of the first layer, and the second [H, G]."""
    item_part, target_part, difference_part, product_part = first.chunk(4, dim=1)
    parts = (item_part + difference_part, product_part, target_part - difference_part, second)
    return [part.T.contiguous() for part in parts]


def _sizes(target: Tensor, parallel: Tensor, first: Tensor, second: Tensor) -> dict[str, Any]:
    dim, (units, hidden) = target.shape[1], second.shape
    return {
        "D": dim,
        "H": hidden,
        "G": units,
        "P": parallel.shape[1],
        "T": ITEMS_OF_BLOCK,
        "D_P": max(SMALLEST, triton.next_power_of_2(dim)),
        "H_T": UNITS_OF_BLOCK,
        "G_P": max(SMALLEST, triton.next_power_of_2(units)),
    }


def _checked(
    operator: str, target: Tensor, items: Tensor, index: Tensor, offsets: Tensor,
    parallel: Tensor, lists: Tensor, first: Tensor, first_bias: Tensor, second: Tensor,
    second_bias: Tensor, last: Tensor,
) -> InputChecks:
    checks, dtype = InputChecks(operator, target.device), torch.float32
    checks.require("target", target, [None, None], dtype)
    dim = target.shape[1]
    checks.require("items", items, [None, dim], dtype)
    checks.require("index", index, [None], torch.int64)
    checks.require("offsets", offsets, [len(target) + 1], torch.int64)
    checks.require("parallel", parallel, [len(index), None], dtype)
    checks.require("lists", lists, [dim, parallel.shape[1]], dtype)
    checks.require("first", first, [None, 4 * dim], dtype)
    checks.require("first_bias", first_bias, [len(first)], dtype)
    checks.require("second", second, [None, len(first)], dtype)
    checks.require("second_bias", second_bias, [len(second)], dtype)
    checks.require("last", last, [1, len(second)], dtype)
    is_inside = (index >= 0) & (index < len(items))
    checks.require_all(is_inside, f"index is out of range [0, {len(items)}), the rows of items")
    rises = (offsets.diff() >= 0).all() & (offsets[0] == 0) & (offsets[-1] == len(index))
    checks.require_all(rises, f"offsets is out of range: they must rise from 0 to {len(index)}")
    return checks


def target_attention(
    target: Tensor, items: Tensor, index: Tensor, offsets: Tensor, parallel: Tensor, lists: Tensor,
    first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor, last: Tensor,
    last_bias: Tensor, keeps_units: bool, bfloat16: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the interest [B, D], the shares [N] of places, and no units, by float32 products."""
    del keeps_units, bfloat16
    events = target, items, index, offsets, parallel, lists
    checks = _checked("target_attention", *events, first, first_bias, second, second_bias, last)
    checks.require("last_bias", last_bias, [1], torch.float32)
    out, shares = torch.zeros_like(target), target.new_empty(len(index))
    w_item, w_product, w_target, by_unit = _weights(first, second)
    inputs = [target, items, index, offsets, parallel, lists.T, w_item, w_product, w_target]
    inputs += [first_bias, by_unit, second_bias, last]
    if len(target):
        forward[(len(target),)](
            *(part.contiguous() for part in inputs),
            out,
            shares,
            **_sizes(target, parallel, first, second),
        )
    return out, shares, target.new_empty(len(index), 0)


def target_attention_backward(
    gradient: Tensor, shares: Tensor, saved: Tensor, target: Tensor, items: Tensor, index: Tensor,
    offsets: Tensor, parallel: Tensor, lists: Tensor, first: Tensor, first_bias: Tensor,
    second: Tensor, second_bias: Tensor, last: Tensor, bfloat16: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of target, items, lists, and the weights of the score."""
    del saved, bfloat16
    events = target, items, index, offsets, parallel, lists
    weights = first, first_bias, second, second_bias, last
    checks = _checked("target_attention_backward", *events, *weights)
    checks.require("gradient", gradient, target.shape, torch.float32)
    checks.require("shares", shares, index.shape, torch.float32)
    sizes, rows = _sizes(target, parallel, first, second), len(target)
    dim, hidden, units = sizes["D"], sizes["H"], sizes["G"]
    rows_of_group = max(1, -(-rows // MOST_GROUPS))
    groups = -(-rows // rows_of_group)
    w_item, w_product, w_target, by_unit = _weights(first, second)
    inputs = [gradient, shares, target, items, index, offsets, parallel, lists.T]
    inputs += [w_item, w_product, w_target, first_bias, by_unit, second_bias, last]
    for_target, for_places = torch.zeros_like(target), target.new_zeros(len(index), dim)
    for_constants = target.new_zeros(rows, hidden)
    sums = [target.new_zeros(groups, *shape) for shape in ((dim, hidden), (dim, hidden))]
    sums += [target.new_zeros(groups, *shape) for shape in ((hidden, units), (units,), (units,))]
    if rows:
        backward[(groups,)](
            *(part.contiguous() for part in inputs), for_target, for_places, *sums[:2],
            for_constants, *sums[2:], B=rows, rows_of_group=rows_of_group, **sizes,
        )
    for_items, for_products, *d_others = (part.sum(dim=0) for part in sums)
    for_rows = for_constants.T @ target  # [H, D], of W2 - W3
    for_first = torch.cat([for_items.T, for_rows, for_items.T - for_rows, for_products.T], dim=1)
    d_lists = for_places.T @ parallel
    for_items = _sum_by_item(for_places, index, len(items))
    for_second, for_second_bias, for_last = d_others
    gradients = [for_target + for_constants @ w_target.T, for_items, d_lists, for_first]
    gradients += [for_constants.sum(dim=0), for_second.T.contiguous(), for_second_bias]
    return (*gradients, for_last.unsqueeze(0))


def _sum_by_item(d_places: Tensor, index: Tensor, num_items: int) -> Tensor:
    """Sum [N, D] over the places of each item, in their order: [U, D]."""
    order = index.argsort(stable=True)
    counts = torch.bincount(index, minlength=num_items)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    return F.embedding_bag(order, d_places, offsets, mode="sum", include_last_offset=True)
