"""Operator `recsys::in_batch_contrastive`: Content-ID-Contrastive of the rows of a batch.

Shapes: B batch, D dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys.kernels.operators import (
    as_float32,
    as_int64,
    empty_like_each,
    register,
    result_dtype,
    row_stride,
)

_INPUTS = "Tensor content, Tensor ids, Tensor items, Tensor sharpness, bool normalize"
torch.library.define(
    "recsys::in_batch_contrastive", f"({_INPUTS}, bool keeps_logits) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "recsys::in_batch_contrastive_backward",
    f"(Tensor gradient, Tensor logs, Tensor kept, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
)

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


def _fake_backward(*inputs: Any) -> tuple[Tensor, ...]:
    *_, content, ids, _, sharpness, _ = inputs
    return empty_like_each((content, ids, sharpness))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *read, ctx.normalize, _ = inputs
    ctx.save_for_backward(*output[1:], *read)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for saved tensors


def _backward(ctx: Any, gradient: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    del unused
    if gradient is None:  # of a result that nothing reads
        return (None,) * 6
    content, ids, sharpness = torch.ops.recsys.in_batch_contrastive_backward(
        gradient, *ctx.saved_tensors, ctx.normalize
    )
    return (content, ids, None, sharpness, None, None)


register("in_batch_contrastive", _fake, _fake_backward, _save, _backward)
