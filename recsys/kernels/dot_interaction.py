"""Operator `recsys::dot_interaction`: the dot products of all pairs of vectors of a DLRM.

The C++ kernel computes one row of the batch after the other in cache: no [B, V, V] tensor exists,
and its backward is one product of the symmetric gradient of the pairs with the vectors.

Shapes: B batch, F sparse features, V = F + 1 vectors, D dimension, I = F * (F + 1) / 2 pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

torch.library.define("recsys::dot_interaction", "(Tensor dense, Tensor sparse) -> Tensor")
torch.library.define(
    "recsys::dot_interaction_backward",
    "(Tensor gradient, Tensor dense, Tensor sparse) -> (Tensor, Tensor)",
)


def native_dot_interaction(
    dense: Tensor, sparse: Tensor
) -> Tensor:  # [B, D], [B, F, D] -> [B, D + I]
    """Return the dense vector and the dot products of the pairs (i, j), i < j, by a kernel.

    The kernel computes in float32. The result has the type that PyTorch's operations give: that of
    `dense` under autocast, and else the wider one.

    Example::

        import torch
        from recsys.kernels import has_native, native_dot_interaction

        dense, sparse = torch.rand(2, 4), torch.rand(2, 3, 4)
        if has_native(dense, sparse):
            native_dot_interaction(dense, sparse)  # [2, 4 + 6]
    """
    dtype = dense.dtype
    if not torch.is_autocast_enabled(dense.device.type):
        dtype = torch.promote_types(dtype, sparse.dtype)
    out: Tensor = torch.ops.recsys.dot_interaction(dense.float(), sparse.float())
    return out.to(dtype)


@torch.library.register_fake("recsys::dot_interaction")
def _fake(dense: Tensor, sparse: Tensor) -> Tensor:
    fields = sparse.shape[1]
    return dense.new_empty(dense.shape[0], dense.shape[1] + fields * (fields + 1) // 2)


@torch.library.register_fake("recsys::dot_interaction_backward")
def _fake_backward(gradient: Tensor, dense: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
    del gradient
    return dense.new_empty(dense.shape), sparse.new_empty(sparse.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = torch.ops.recsys.dot_interaction_backward(
        gradient, *ctx.saved_tensors
    )
    return gradients


torch.library.register_autograd("recsys::dot_interaction", _backward, setup_context=_save)
