"""Operator `recsys::dot_interaction`: the dot products of all pairs of vectors of a DLRM.

Shapes: B batch, F sparse features, V = F + 1 vectors, D dimension, I = F * (F + 1) / 2 pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recsys.kernels.operators import as_float32, empty_like_each, register, result_dtype

torch.library.define("recsys::dot_interaction", "(Tensor dense, Tensor[] sparse) -> Tensor")
torch.library.define(
    "recsys::dot_interaction_backward",
    "(Tensor gradient, Tensor dense, Tensor[] sparse) -> (Tensor, Tensor[])",
)


def native_dot_interaction(
    dense: Tensor,  # [B, D]
    sparse: Tensor | Sequence[Tensor],  # [B, F, D], or F tensors [B, D], read where they are
) -> Tensor:  # [B, D + I]
    """Return the dense vector and the dot products of the pairs (i, j), i < j, by a kernel.

    It computes in float32; the result has the type that PyTorch's operations give.
    """
    parts = [sparse] if isinstance(sparse, Tensor) else list(sparse)
    vectors = {f"sparse[{place}]": part for place, part in enumerate(parts)}
    dense32, *sparse32 = as_float32("dot_interaction", dense=dense, **vectors)
    out: Tensor = torch.ops.recsys.dot_interaction(dense32, sparse32)
    device = dense.device.type
    if torch.is_autocast_enabled(device):
        return out.to(torch.promote_types(dense.dtype, torch.get_autocast_dtype(device)))
    return out.to(result_dtype(dense, *parts))


def _fake(dense: Tensor, sparse: Sequence[Tensor]) -> Tensor:
    fields = sum(part.shape[1] if part.dim() == 3 else 1 for part in sparse)
    return dense.new_empty(dense.shape[0], dense.shape[1] + fields * (fields + 1) // 2)


def _fake_backward(
    gradient: Tensor, dense: Tensor, sparse: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    del gradient
    return dense.new_empty(dense.shape), list(empty_like_each(sparse))


def _save(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor]], output: Tensor) -> None:
    del output
    ctx.save_for_backward(inputs[0], *inputs[1])


def _backward(ctx: Any, gradient: Tensor) -> Any:
    dense, *sparse = ctx.saved_tensors
    return torch.ops.recsys.dot_interaction_backward(gradient, dense, sparse)


register("dot_interaction", _fake, _fake_backward, _save, _backward)
