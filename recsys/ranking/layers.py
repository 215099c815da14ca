"""The stacks of layers that ranking models end with."""

from __future__ import annotations

from torch import nn

from recsys.config import RankingSettings
from recsys.dropout import Dropout


def hidden_layers(width: int, units: list[int], dropout: float) -> tuple[list[nn.Module], int]:
    """Dropout, then a linear map, ReLU and dropout for each of `units`; and their output width."""
    layers: list[nn.Module] = [Dropout(dropout)]
    for count in units:
        layers += [nn.Linear(width, count), nn.ReLU(), Dropout(dropout)]
        width = count
    return layers, width


def multilayer_perceptron(
    width: int, settings: RankingSettings, num_outputs: int, units: list[int] | None = None
) -> nn.Sequential:
    """`hidden_layers` of `units` (default `settings.mlp_units`), then a linear map."""
    units = settings.mlp_units if units is None else units
    layers, width = hidden_layers(width, units, settings.dropout)
    return nn.Sequential(*layers, nn.Linear(width, num_outputs))
