"""Operator `recsys::dot_interaction`: the dot products of all pairs of vectors of a DLRM.

Shapes: B batch, F sparse features, V = F + 1 vectors, D dimension, I = F * (F + 1) / 2 pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recsys.kernels.operators import Operator, as_float32, result_dtype


def native_dot_interaction(
    dense: Tensor,  # [B, D]
    sparse: Tensor | Sequence[Tensor],  # [B, F, D], or F tensors [B, D], read where they are
) -> Tensor:  # [B, D + I]
    """Return the dense vector and the dot products of pairs, by a kernel, of PyTorch's type."""
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


Operator(
    "dot_interaction",
    inputs="Tensor dense, Tensor[] sparse",
    backward_inputs="Tensor gradient, Tensor dense, Tensor[] sparse",
    gradients=("dense", "sparse"),
    num_outputs=1,
).define(_fake)
