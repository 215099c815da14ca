"""Losses of labels by kind, and the predictions that logits stand for.

Shapes: B batch, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

# Logits and labels of the same shape -> losses of that shape.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": partial(F.binary_cross_entropy_with_logits, reduction="none"),
    "mse": partial(F.mse_loss, reduction="none"),
    "huber": partial(F.huber_loss, reduction="none"),
    "poisson": partial(F.poisson_nll_loss, log_input=True, reduction="none"),
}


def label_losses(
    logits: Tensor,  # [..., C]
    labels: Tensor,  # [..., C]
    losses: Sequence[str],  # [C]
) -> Tensor:  # [..., C]
    """Return the loss of each row and label."""
    if set(losses) == {"bce"}:
        return LOSSES["bce"](logits, labels)
    of_labels = zip(losses, logits.unbind(-1), labels.unbind(-1), strict=True)
    return torch.stack([LOSSES[loss](*columns) for loss, *columns in of_labels], dim=-1)


def predictions(logits: Tensor, losses: Sequence[str]) -> Tensor:  # [B, C], [C] -> [B, C]
    """Return the prediction of each label: a probability (bce), a number, or an expected count."""
    of_losses = {"bce": torch.sigmoid, "poisson": torch.exp}
    columns = zip(losses, logits.unbind(1), strict=True)
    return torch.stack([of_losses.get(loss, torch.clone)(of) for loss, of in columns], dim=1)
