"""The linear map from an encoder's outputs to the content dimension.

Shapes: E width of the encoder, D content dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Projection(nn.Linear):
    """A linear map of inputs that fixed numbers shift and scale first.

    By default they change nothing. Inputs of a large scale, such as unscaled features, need them:
    an optimizer's steps would else move the outputs by that scale.
    """

    shift: Tensor  # [E]
    scale: Tensor  # []

    def __init__(self, in_features: int, out_features: int) -> None:
        """Build the map with shift 0 and scale 1."""
        super().__init__(in_features, out_features)
        self.register_buffer("shift", torch.zeros(in_features))
        self.register_buffer("scale", torch.ones(()))

    def scaled(self, inputs: Tensor) -> Tensor:  # [..., E] -> [..., E]
        """Return the inputs, shifted and scaled."""
        return (inputs - self.shift) * self.scale

    def forward(self, inputs: Tensor) -> Tensor:  # [..., E] -> [..., D]
        """Return the map of the shifted and scaled inputs."""
        return super().forward(self.scaled(inputs))
