"""The stacks of layers that ranking models end with.

Dropout acts behind each hidden layer, not on what a model reads: a similarity of content is one
number that has no double, and an MLP that misses it in a third of the steps learns to do without.
On MovieLens that alone decided whether content helped DIN.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from recsys.config import RankingSettings
from recsys.config.limits import NonNegativeInt, PositiveInt
from recsys.content.dropout import Dropout
from recsys.ranking.layers.ensemble_head import EnsembleHead


@dataclass
class HeadSettings(RankingSettings):
    """Settings of `ranking_head`."""

    ensemble_members: PositiveInt = 1
    """So many MLPs in one (TabM), whose mean logit ranks; 1 is one MLP."""


@dataclass
class CrossSettings(RankingSettings):
    """Settings of a low-rank cross network (DCN-v2)."""

    cross_layers: NonNegativeInt = 2
    """Layers of the cross network."""
    cross_rank: PositiveInt = 32
    """Rank of their weights."""


def hidden_layers(width: int, units: list[int], dropout: float) -> tuple[list[nn.Module], int]:
    """A linear map, ReLU and dropout for each of `units`; and their output width."""
    layers: list[nn.Module] = []
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


def ranking_head(
    width: int, settings: HeadSettings, num_outputs: int, drops_inputs: bool = False
) -> nn.Sequential:
    """`multilayer_perceptron`, or an ensemble of `settings.ensemble_members` of them.

    `drops_inputs` has dropout act on what the head reads, too.
    """
    first = [Dropout(settings.dropout)] if drops_inputs else []
    if settings.ensemble_members == 1:
        return nn.Sequential(*first, *multilayer_perceptron(width, settings, num_outputs))
    units, members = settings.mlp_units, settings.ensemble_members
    return nn.Sequential(*first, EnsembleHead(width, units, num_outputs, members, settings.dropout))
