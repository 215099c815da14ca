"""Dropout whose mask is cheap to draw on CPU.

torch draws the mask of `nn.Dropout` on CPU from a Bernoulli distribution in double precision, which
takes three times as long as uniform numbers in single precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """Dropout like `nn.Dropout`: in training an element is zero with probability p, else scaled up.

    Example::

        Dropout(0.5)(torch.ones(2, 2))  # zeros and twos
    """

    def forward(self, input: Tensor) -> Tensor:  # any shape -> same shape
        """Return the input with some elements zero in training."""
        if not self.training or self.p in (0, 1) or input.device.type != "cpu":
            return super().forward(input)
        # In place: of the mask's few operations each would else write a tensor of its own.
        factors = torch.rand(input.shape).ge_(self.p).div_(1 - self.p)
        return input * factors.to(input.dtype)
