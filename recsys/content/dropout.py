"""Dropout of single numbers, whose mask costs little on CPU, and of whole ID vectors.

torch draws the mask of `nn.Dropout` on CPU from a Bernoulli distribution in double precision, which
takes three times as long as uniform numbers in single precision.

Shapes: B batch, D dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """Does as `nn.Dropout`: in training each element is zero with probability p, else scaled up.

    Example::

        Dropout(0.5)(torch.ones(2, 2))  # zeros and twos
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p in (0, 1) or input.device.type != "cpu":
            return super().forward(input)
        is_kept = torch.rand(input.shape) >= self.p
        return input * (is_kept.to(input.dtype) / (1 - self.p))
