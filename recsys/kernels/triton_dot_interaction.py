"""The dot interaction on CUDA, in Triton, not yet measured on a GPU: one program per row.

Shapes: B batch, F sparse features, V = F + 1 vectors, D dimension, I = F * (F + 1) / 2 pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from recsys.kernels.operators import InputChecks

SMALLEST = 16  # rows and columns of a `tl.dot`


@triton.jit
def _load_vectors(dense, sparse, row, V, D, V_PADDED: tl.constexpr, D_PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a row's vectors [V_PADDED, D_PADDED], the dense one first."""
    v = tl.arange(0, V_PADDED)[:, None]
    d = tl.arange(0, D_PADDED)[None, :]
    dense_vector = tl.load(dense + row * D + d + v * 0, mask=(v == 0) & (d < D), other=0.0)
    place = row * (V - 1) * D + (v - 1) * D + d
    return dense_vector + tl.load(sparse + place, mask=(v > 0) & (v < V) & (d < D), other=0.0)


@triton.jit
def _forward(dense, sparse, out, V, D, width, V_PADDED: tl.constexpr, D_PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    vectors = _load_vectors(dense, sparse, row, V, D, V_PADDED, D_PADDED)
    products = tl.dot(vectors, tl.trans(vectors), input_precision="ieee")
    i = tl.arange(0, V_PADDED)[:, None]
    j = tl.arange(0, V_PADDED)[None, :]
    pair = i * V - i * (i + 1) // 2 + j - i - 1
    tl.store(out + row * width + D + pair, products, mask=(i < j) & (j < V))
    d = tl.arange(0, D_PADDED)
    tl.store(out + row * width + d, tl.load(dense + row * D + d, mask=d < D), mask=d < D)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    gradient, dense, sparse, to_dense, to_sparse, V, D, width,
    V_PADDED: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    vectors = _load_vectors(dense, sparse, row, V, D, V_PADDED, D_PADDED)
    i = tl.arange(0, V_PADDED)[:, None]
    j = tl.arange(0, V_PADDED)[None, :]
    low, high = tl.minimum(i, j), tl.maximum(i, j)
    pair = low * V - low * (low + 1) // 2 + high - low - 1
    mask = (low < high) & (high < V)
    pair_gradients = tl.load(gradient + row * width + D + pair, mask=mask, other=0.0)
    results = tl.dot(pair_gradients, vectors, input_precision="ieee")
    v = tl.arange(0, V_PADDED)[:, None]
    d = tl.arange(0, D_PADDED)[None, :]
    is_dense = (v == 0) & (d < D)
    dense_gradient = tl.load(gradient + row * width + d + v * 0, mask=is_dense, other=0.0)
    tl.store(to_dense + row * D + d + v * 0, results + dense_gradient, mask=is_dense)
    place = row * (V - 1) * D + (v - 1) * D + d
    tl.store(to_sparse + place, results, mask=(v > 0) & (v < V) & (d < D))


def _sizes(dense: Tensor, sparse: Tensor) -> dict[str, Any]:
    vectors, dim = sparse.shape[1] + 1, dense.shape[1]
    return {
        "V": vectors,
        "D": dim,
        "width": dim + vectors * (vectors - 1) // 2,
        "V_PADDED": max(SMALLEST, triton.next_power_of_2(vectors)),
        "D_PADDED": max(SMALLEST, triton.next_power_of_2(dim)),
    }


def _checked(operator: str, dense: Tensor, sparse: Sequence[Tensor]) -> InputChecks:
    checks = InputChecks(operator, dense.device)
    checks.require("dense", dense, [None, None], torch.float32)
    for place, part in enumerate(sparse):
        shape = [len(dense), None, dense.shape[1]] if part.dim() == 3 else dense.shape
        checks.require(f"sparse[{place}]", part, shape, torch.float32)
    return checks


def _joined(
    dense: Tensor,  # [B, D]
    sparse: Sequence[Tensor],  # [B, D] or [B, features, D] each
) -> Tensor:  # [B, F, D]
    parts = [part if part.dim() == 3 else part.unsqueeze(1) for part in sparse]
    if len(parts) == 1:
        return parts[0].contiguous()
    return torch.cat([dense.new_empty(len(dense), 0, dense.shape[1]), *parts], dim=1)


def dot_interaction(dense: Tensor, sparse: Sequence[Tensor]) -> Tensor:  # -> [B, D + I]
    """Return the dense vector [B, D] and the dot products of the pairs (i, j), i < j."""
    _checked("dot_interaction", dense, sparse)
    dense, vectors = dense.contiguous(), _joined(dense, sparse)
    sizes = _sizes(dense, vectors)
    out = dense.new_empty(len(dense), sizes["width"])
    if len(dense):
        _forward[(len(dense),)](dense, vectors, out, **sizes)
    return out


def dot_interaction_backward(
    gradient: Tensor,  # [B, D + I]
    dense: Tensor,  # [B, D]
    sparse: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of dense [B, D] and of each tensor of sparse features."""
    checks = _checked("dot_interaction_backward", dense, sparse)
    vectors, dense = _joined(dense, sparse), dense.contiguous()
    sizes = _sizes(dense, vectors)
    checks.require("gradient", gradient, [len(dense), sizes["width"]], torch.float32)
    gradient = gradient.contiguous()
    to_dense, to_sparse = torch.empty_like(dense), torch.empty_like(vectors)
    if len(dense):
        _backward[(len(dense),)](gradient, dense, vectors, to_dense, to_sparse, **sizes)
    counts = [part.shape[1] if part.dim() == 3 else 1 for part in sparse]
    parts = to_sparse.split(counts, dim=1)
    return to_dense, [
        part.reshape(like.shape).clone() for part, like in zip(parts, sparse, strict=True)
    ]
