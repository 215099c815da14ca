"""Output heads of ranking models: a stack of layers, or an ensemble of such stacks (TabM).

TabM: Gorishniy et al. 2025, arXiv 2410.24210; BatchEnsemble: arXiv 2002.06715.
Shapes: K members, B batch, I and O units of a layer, C labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys.config import RankingSettings
from recsys.content.dropout import Dropout
from recsys.ranking.settings import HeadSettings
from recsys.ranking.vectors import MemberLogits


class EnsembleLinear(nn.Module):
    """A linear map that K members share: `((x * scale_in) @ weight) * scale_out + bias`.

    `scale_in` starts as random signs, or without `signs` at 1, like `scale_out`.
    """

    def __init__(self, num_inputs: int, num_outputs: int, members: int, signs: bool) -> None:
        super().__init__()
        bound = num_inputs**-0.5
        input_scale = torch.ones(members, 1, num_inputs)
        if signs:
            input_scale = torch.randint_like(input_scale, 2) * 2 - 1
        self.scale_in = nn.Parameter(input_scale)
        self.weight = nn.Parameter(torch.empty(num_inputs, num_outputs).uniform_(-bound, bound))
        self.scale_out = nn.Parameter(torch.ones(members, 1, num_outputs))
        self.bias = nn.Parameter(torch.empty(members, 1, num_outputs).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:  # [K or 1, B, I] -> [K, B, O]
        return torch.matmul(inputs * self.scale_in, self.weight) * self.scale_out + self.bias


class MemberLinear(nn.Module):
    """A linear map of each member: the last layer."""

    def __init__(self, num_inputs: int, num_outputs: int, members: int) -> None:
        super().__init__()
        bound = num_inputs**-0.5
        weight = torch.empty(members, num_inputs, num_outputs).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.empty(members, 1, num_outputs).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:  # [K, B, I] -> [K, B, O]
        return torch.baddbmm(self.bias, inputs, self.weight)


class EnsembleHead(nn.Module):
    """K MLPs with `units` and ReLU over the same features; dropout is drawn for each member."""

    def __init__(
        self, width: int, units: list[int], num_outputs: int, members: int, dropout: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for count in units:
            linear = EnsembleLinear(width, count, members, signs=not layers)
            layers += [linear, nn.ReLU(), Dropout(dropout)]
            width = count
        self.members = members
        self.layers = nn.Sequential(*layers, MemberLinear(width, num_outputs, members))

    def forward(self, features: Tensor) -> MemberLogits | Tensor:  # [B, width] -> [B, C]
        """Return the logits [K, B, C] of the members in training, else their mean [B, C]."""
        logits = self.layers(features.expand(self.members, -1, -1))
        return MemberLogits(logits) if self.training else logits.mean(0)


def hidden_layers(width: int, units: list[int], dropout: float) -> tuple[list[nn.Module], int]:
    """Return a linear map, ReLU and dropout for each of `units`, and the output width."""
    layers: list[nn.Module] = []
    for count in units:
        layers += [nn.Linear(width, count), nn.ReLU(), Dropout(dropout)]
        width = count
    return layers, width


def multilayer_perceptron(
    width: int, settings: RankingSettings, num_outputs: int, units: list[int] | None = None
) -> nn.Sequential:
    """Return `hidden_layers` of `units` (default `settings.mlp_units`), then a linear map."""
    units = settings.mlp_units if units is None else units
    layers, width = hidden_layers(width, units, settings.dropout)
    return nn.Sequential(*layers, nn.Linear(width, num_outputs))


def ranking_head(
    width: int, settings: HeadSettings, num_outputs: int, drops_inputs: bool = False
) -> nn.Sequential:
    """Return a `multilayer_perceptron`, or an ensemble of `settings.ensemble_members` of them."""
    first = [Dropout(settings.dropout)] if drops_inputs else []
    if settings.ensemble_members == 1:
        return nn.Sequential(*first, *multilayer_perceptron(width, settings, num_outputs))
    units, members = settings.mlp_units, settings.ensemble_members
    return nn.Sequential(*first, EnsembleHead(width, units, num_outputs, members, settings.dropout))
