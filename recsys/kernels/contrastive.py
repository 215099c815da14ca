"""Operator `recsys::in_batch_contrastive`: Content-ID-Contrastive of the rows of a batch.

PyTorch writes ten matrices [B, B] for it: logits, masks, their softmax in both directions, and the
gradients. The C++ kernel computes both directions from a block of logits in cache.

Shapes: B batch, D dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys.kernels.checks import as_float32, as_int64, refuse_second_derivative, result_dtype

_INPUTS = "Tensor content, Tensor ids, Tensor items, Tensor sharpness, bool normalize"
torch.library.define(
    "recsys::in_batch_contrastive", f"({_INPUTS}, bool keeps_logits) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "recsys::in_batch_contrastive_backward",
    f"(Tensor gradient, Tensor logs, Tensor kept, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
)

MAX_KEPT_BYTES = 16 << 20  # of the logits; the backward computes more of them again


def native_in_batch_contrastive(
    content: Tensor,  # [B, D]
    ids: Tensor,  # [B, D]
    items: Tensor,  # int64 [B]
    sharpness: Tensor,  # [], factor of the dot products: 1 / temperature
    normalize: bool,  # divides vectors by their lengths first
) -> Tensor:  # [B]
    """Return the mean of both directions' cross-entropies of each row.

    Rows of the same item and padding rows, whose item is -1, are never negatives. Computed in
    float32; the result has the type of the vectors, and under autocast float32.

    Raises:
        ValueError: an input is of a type that kernels do not read.

    Example::

        import torch
        from recsys.kernels import has_native, native_in_batch_contrastive

        content, ids = torch.rand(3, 8), torch.rand(3, 8)
        items, sharpness = torch.tensor([4, 5, 4]), torch.tensor(10.0)
        if has_native(content, ids):
            native_in_batch_contrastive(content, ids, items, sharpness, normalize=True)  # [3]
    """
    keeps_logits = torch.is_grad_enabled() and 4 * items.numel() ** 2 <= MAX_KEPT_BYTES
    operator = "in_batch_contrastive"
    *sides, factor = as_float32(operator, content=content, ids=ids, sharpness=sharpness)
    (rows,) = as_int64(operator, items=items)
    losses: Tensor = torch.ops.recsys.in_batch_contrastive(
        *sides, rows, factor, normalize, keeps_logits
    )[0]
    return losses.to(result_dtype(content, ids))


@torch.library.register_fake("recsys::in_batch_contrastive")
def _fake(content: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, keeps_logits = rest
    batch = content.shape[0]
    whole = (batch + 15) // 16 * 16  # `distance_of` of the C++ code
    distance = whole + 16 if whole >= 128 else whole
    kept = content.new_empty(batch if keeps_logits else 0, distance)
    return content.new_empty(batch), content.new_empty(2, batch), kept


@torch.library.register_fake("recsys::in_batch_contrastive_backward")
def _fake_backward(*inputs: Any) -> tuple[Tensor, ...]:
    *_, content, ids, _, sharpness, _ = inputs
    return tuple(part.new_empty(part.shape) for part in (content, ids, sharpness))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *read, ctx.normalize, _ = inputs
    ctx.save_for_backward(*output[1:], *read)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for what is kept


def _backward(ctx: Any, gradient: Tensor | None, *of_kept: None) -> tuple[Tensor | None, ...]:
    del of_kept
    if gradient is None:  # of a result that nothing reads
        return (None,) * 6
    of_content, of_ids, of_sharpness = torch.ops.recsys.in_batch_contrastive_backward(
        gradient, *ctx.saved_tensors, ctx.normalize
    )
    return (of_content, of_ids, None, of_sharpness, None, None)


torch.library.register_autograd("recsys::in_batch_contrastive", _backward, setup_context=_save)
refuse_second_derivative("in_batch_contrastive")
