"""Dropout of single numbers, whose mask costs little on CPU, and of whole ID vectors.

torch draws the mask of `nn.Dropout` on CPU from a Bernoulli distribution in double precision, which
takes three times as long as uniform numbers in single precision.

Shapes: B batch, D dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """As `nn.Dropout`: in training each element is zero with probability p, else scaled up.

    Example::

        Dropout(0.5)(torch.ones(2, 2))  # zeros and twos
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p in (0, 1) or input.device.type != "cpu":
            return super().forward(input)
        is_kept = torch.rand(input.shape) >= self.p
        return input * (is_kept.to(input.dtype) / (1 - self.p))


class IDDropout(nn.Module):
    """In training each ID vector is zero with probability p, and nothing is scaled up.

    New ids come with a vector that was never trained and is nearly zero. A model that has seen no
    such rows trusts them; one that has learns what history and content say instead.

    Example::

        IDDropout(0.5)(torch.ones(2, 3))  # rows of zeros and of ones
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, vectors: Tensor) -> Tensor:  # [B, D]
        if not self.training or not self.p:
            return vectors
        is_kept = torch.rand(len(vectors), 1, device=vectors.device) >= self.p
        return vectors * is_kept.to(vectors.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}"
