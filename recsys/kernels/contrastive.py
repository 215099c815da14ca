"""Operator `recsys::in_batch_contrastive`: Content-ID-Contrastive of the rows of a batch.

Shapes: B batch, D dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys.kernels.operators import Operator, as_float32, as_int64, result_dtype, row_stride

_INPUTS = "Tensor content, Tensor ids, Tensor items, Tensor sharpness, bool normalize"
MAX_LOGIT_BYTES = 16 << 20  # saved for the backward, which computes more of them again


def native_in_batch_contrastive(
    content: Tensor,  # [B, D]
    ids: Tensor,  # [B, D]
    items: Tensor,  # int64 [B]
    sharpness: Tensor,  # [], factor of the dot products: 1 / temperature
    normalize: bool,  # divides vectors by their lengths first
) -> Tensor:  # [B]
    """Return the mean of both directions' cross-entropies of each row.

    Rows of the same item and padding rows, whose item is -1, are never negatives. The result has
    the type of the vectors, and under autocast float32.
    """
    keeps_logits = torch.is_grad_enabled() and 4 * items.numel() ** 2 <= MAX_LOGIT_BYTES
    operator = "in_batch_contrastive"
    *sides, factor = as_float32(operator, content=content, ids=ids, sharpness=sharpness)
    (rows,) = as_int64(operator, items=items)
    losses: Tensor = torch.ops.recsys.in_batch_contrastive(
        *sides, rows, factor, normalize, keeps_logits
    )[0]
    return losses.to(result_dtype(content, ids))


def _fake(content: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, keeps_logits = rest
    batch = content.shape[0]
    logits = content.new_empty(batch if keeps_logits else 0, row_stride(batch))
    return content.new_empty(batch), content.new_empty(2, batch), logits


Operator(
    "in_batch_contrastive",
    inputs=f"{_INPUTS}, bool keeps_logits",
    backward_inputs=f"Tensor gradient, Tensor logs, Tensor kept, {_INPUTS}",
    gradients=("content", "ids", "sharpness"),
    num_outputs=3,
).define(_fake)
