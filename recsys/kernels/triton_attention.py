"""Target attention on CUDA, in Triton: launches the kernels and sums what groups of rows gave.

Not measured on a GPU yet; tests compare it with the reference in Triton's interpreter. Imported
only where triton is installed.

Shapes: as in `recsys.kernels.target_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from recsys.kernels import triton_attention_kernels as kernels
from recsys.kernels.checks import InputChecks

ITEMS_OF_BLOCK, UNITS_OF_BLOCK, SMALLEST = 16, 32, 16
MOST_GROUPS = 256


def _weights(first: Tensor, second: Tensor) -> list[Tensor]:
    """Return W_h, W_p and W_t [D, H] of the first layer, and the second [H, G]."""
    of_item, of_target, of_difference, of_product = first.chunk(4, dim=1)
    parts = (of_item + of_difference, of_product, of_target - of_difference, second)
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
) -> InputChecks:  # fmt: skip
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
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the interest [B, D], the shares [N] of places, and no units, which are not kept.

    Products are in float32, also where bfloat16 is asked for.
    """
    del keeps_units, bfloat16
    events = target, items, index, offsets, parallel, lists
    checks = _checked("target_attention", *events, first, first_bias, second, second_bias, last)
    checks.require("last_bias", last_bias, [1], torch.float32)
    out, shares = torch.zeros_like(target), target.new_empty(len(index))
    of_items, of_products, of_target, by_unit = _weights(first, second)
    inputs = [target, items, index, offsets, parallel, lists.T, of_items, of_products, of_target]
    inputs += [first_bias, by_unit, second_bias, last]
    if len(target):
        kernels.forward[(len(target),)](
            *(part.contiguous() for part in inputs),
            out,
            shares,
            **_sizes(target, parallel, first, second),
        )
    return out, shares, target.new_empty(len(index), 0)


def target_attention_backward(
    gradient: Tensor, shares: Tensor, kept: Tensor, target: Tensor, items: Tensor, index: Tensor,
    offsets: Tensor, parallel: Tensor, lists: Tensor, first: Tensor, first_bias: Tensor,
    second: Tensor, second_bias: Tensor, last: Tensor, bfloat16: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of target, items, lists, and the weights of the score."""
    del kept, bfloat16
    events = target, items, index, offsets, parallel, lists
    weights = first, first_bias, second, second_bias, last
    checks = _checked("target_attention_backward", *events, *weights)
    checks.require("gradient", gradient, target.shape, torch.float32)
    checks.require("shares", shares, index.shape, torch.float32)
    sizes, rows = _sizes(target, parallel, first, second), len(target)
    dim, hidden, units = sizes["D"], sizes["H"], sizes["G"]
    rows_of_group = max(1, -(-rows // MOST_GROUPS))
    groups = -(-rows // rows_of_group)
    of_items, of_products, of_target, by_unit = _weights(first, second)
    inputs = [gradient, shares, target, items, index, offsets, parallel, lists.T]
    inputs += [of_items, of_products, of_target, first_bias, by_unit, second_bias, last]
    for_target, for_places = torch.zeros_like(target), target.new_zeros(len(index), dim)
    for_constants = target.new_zeros(rows, hidden)
    sums = [target.new_zeros(groups, *shape) for shape in ((dim, hidden), (dim, hidden))]
    sums += [target.new_zeros(groups, *shape) for shape in ((hidden, units), (units,), (units,))]
    if rows:
        kernels.backward[(groups,)](
            *(part.contiguous() for part in inputs), for_target, for_places, *sums[:2],
            for_constants, *sums[2:], B=rows, rows_of_group=rows_of_group, **sizes,
        )  # fmt: skip
    for_items, for_products, *of_others = (part.sum(dim=0) for part in sums)
    for_rows = for_constants.T @ target  # [H, D], of W2 - W3
    for_first = torch.cat([for_items.T, for_rows, for_items.T - for_rows, for_products.T], dim=1)
    of_lists = for_places.T @ parallel
    for_items = _sum_by_item(for_places, index, len(items))
    for_second, for_second_bias, for_last = of_others
    gradients = [for_target + for_constants @ of_target.T, for_items, of_lists, for_first]
    gradients += [for_constants.sum(dim=0), for_second.T.contiguous(), for_second_bias]
    return (*gradients, for_last.unsqueeze(0))


def _sum_by_item(of_places: Tensor, index: Tensor, num_items: int) -> Tensor:
    """Sum [N, D] over the places of each item, in their order: [U, D]."""
    order = index.argsort(stable=True)
    counts = torch.bincount(index, minlength=num_items)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    return F.embedding_bag(order, of_places, offsets, mode="sum", include_last_offset=True)
