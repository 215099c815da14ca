"""Many MLPs in one: an ensemble whose members share nearly all weights (TabM).

After Gorishniy et al. 2025 (TabM, arXiv 2410.24210), who build on BatchEnsemble (Wen et al. 2020,
arXiv 2002.06715). Each hidden layer has one weight, before and behind which each member scales
every unit by a number of its own; biases and the last layer are each member's own. Members start
apart by random signs of their inputs. Each has its own loss in training; their mean logit ranks.
That takes out much of what differs from seed to seed, at the arithmetic of K MLPs.

Shapes: K members, B batch, I and O units of a layer, C labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys.content.dropout import Dropout
from recsys.ranking.vectors import MemberLogits


class EnsembleLinear(nn.Module):
    """A linear map that K members share: `((x * scale_in) @ weight) * scale_out + bias`.

    Args:
        num_inputs, num_outputs: I and O.
        members: K.
        signs: whether `scale_in` starts as random signs; else at 1, as `scale_out` does.
    """

    def __init__(self, num_inputs: int, num_outputs: int, members: int, signs: bool) -> None:
        super().__init__()
        bound = num_inputs**-0.5
        scale_in = torch.ones(members, 1, num_inputs)
        if signs:
            scale_in = torch.randint_like(scale_in, 2) * 2 - 1
        self.scale_in = nn.Parameter(scale_in)
        self.weight = nn.Parameter(torch.empty(num_inputs, num_outputs).uniform_(-bound, bound))
        self.scale_out = nn.Parameter(torch.ones(members, 1, num_outputs))
        self.bias = nn.Parameter(torch.empty(members, 1, num_outputs).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:  # [K or 1, B, I] -> [K, B, O]
        return torch.matmul(inputs * self.scale_in, self.weight) * self.scale_out + self.bias


class MemberLinear(nn.Module):
    """A linear map of each member's own: the last layer."""

    def __init__(self, num_inputs: int, num_outputs: int, members: int) -> None:
        super().__init__()
        bound = num_inputs**-0.5
        weight = torch.empty(members, num_inputs, num_outputs).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.empty(members, 1, num_outputs).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:  # [K, B, I] -> [K, B, O]
        return torch.baddbmm(self.bias, inputs, self.weight)


class EnsembleHead(nn.Module):
    """K MLPs with `units` and ReLU over the same features.

    Args:
        width: of the features.
        units: of the hidden layers; with none, members share nothing.
        num_outputs: C.
        members: K.
        dropout: behind each hidden layer, another for each member.

    Example::

        head = EnsembleHead(5, [8], num_outputs=1, members=4, dropout=0.0)
        head(torch.ones(2, 5)).members.shape  # [4, 2, 1]; in evaluation logits [2, 1]
    """

    def __init__(
        self, width: int, units: list[int], num_outputs: int, members: int, dropout: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for count in units:
            layers += [
                EnsembleLinear(width, count, members, signs=not layers),
                nn.ReLU(),
                Dropout(dropout),
            ]
            width = count
        self.members = members
        self.layers = nn.Sequential(*layers, MemberLinear(width, num_outputs, members))

    def forward(self, features: Tensor) -> MemberLogits | Tensor:  # [B, width] -> [B, C]
        logits = self.layers(features.expand(self.members, -1, -1))
        return MemberLogits(logits) if self.training else logits.mean(0)
