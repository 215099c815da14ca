"""Stacks of layers at the end of ranking models.

Dropout acts after each hidden layer, not on the model's inputs: a content similarity is a single
number without a duplicate, and an MLP that misses it in a third of the steps learns to ignore it.
On MovieLens that alone decided whether content helped DIN.
"""

from __future__ import annotations

from torch import nn

from recsys.config import RankingSettings
from recsys.content.dropout import Dropout
from recsys.ranking.layers.ensemble_head import EnsembleHead
from recsys.ranking.settings import HeadSettings


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
    """Return a `multilayer_perceptron`, or an ensemble of `settings.ensemble_members` of them.

    With `drops_inputs` dropout also acts on the inputs of the head.
    """
    first = [Dropout(settings.dropout)] if drops_inputs else []
    if settings.ensemble_members == 1:
        return nn.Sequential(*first, *multilayer_perceptron(width, settings, num_outputs))
    units, members = settings.mlp_units, settings.ensemble_members
    return nn.Sequential(*first, EnsembleHead(width, units, num_outputs, members, settings.dropout))
