"""Operator `recsys::dot_interaction`: the dot products of all pairs of vectors of a DLRM.

The C++ kernel computes one row of the batch after the other in cache: no [B, V, V] tensor exists,
and its backward is one product of the symmetric gradient of the pairs with the vectors.

Shapes: B batch, F sparse features, V = F + 1 vectors, D dimension, I = F * (F + 1) / 2 pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

torch.library.define("recsys::dot_interaction", "(Tensor dense, Tensor[] sparse) -> Tensor")
torch.library.define(
    "recsys::dot_interaction_backward",
    "(Tensor gradient, Tensor dense, Tensor[] sparse) -> (Tensor, Tensor[])",
)


def native_dot_interaction(
    dense: Tensor,  # [B, D]
    sparse: Tensor | Sequence[Tensor],  # [B, F, D], or F tensors [B, D]
) -> Tensor:  # [B, D + I]
    """Return the dense vector and the dot products of the pairs (i, j), i < j, by a kernel.

    Vectors of a list are read where they are, such as in the result of a lookup of all tables.
    The kernel computes in float32. The result has the type that PyTorch's operations give: that of
    `dense` under autocast, and else the wider one.

    Example::

        import torch
        from recsys.kernels import has_native, native_dot_interaction

        dense, sparse = torch.rand(2, 4), torch.rand(2, 3, 4)
        if has_native(dense, sparse):
            native_dot_interaction(dense, sparse)  # [2, 4 + 6]
    """
    parts = [sparse] if isinstance(sparse, Tensor) else list(sparse)
    dtype = dense.dtype
    if not torch.is_autocast_enabled(dense.device.type):
        for part in parts:
            dtype = torch.promote_types(dtype, part.dtype)
    out: Tensor = torch.ops.recsys.dot_interaction(dense.float(), [part.float() for part in parts])
    return out.to(dtype)


@torch.library.register_fake("recsys::dot_interaction")
def _fake(dense: Tensor, sparse: Sequence[Tensor]) -> Tensor:
    fields = sum(part.shape[1] if part.dim() == 3 else 1 for part in sparse)
    return dense.new_empty(dense.shape[0], dense.shape[1] + fields * (fields + 1) // 2)


@torch.library.register_fake("recsys::dot_interaction_backward")
def _fake_backward(
    gradient: Tensor, dense: Tensor, sparse: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    del gradient
    return dense.new_empty(dense.shape), [part.new_empty(part.shape) for part in sparse]


def _save(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor]], output: Tensor) -> None:
    del output
    ctx.save_for_backward(inputs[0], *inputs[1])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
    dense, *sparse = ctx.saved_tensors
    gradients: tuple[Tensor, list[Tensor]] = torch.ops.recsys.dot_interaction_backward(
        gradient, dense, sparse
    )
    return gradients


torch.library.register_autograd("recsys::dot_interaction", _backward, setup_context=_save)
