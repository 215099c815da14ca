"""Builds the ranking model that a configuration names."""

from __future__ import annotations

from torch import nn

from recsys.config import ContentSettings, RankingSettings
from recsys.config.named_parts import make_part
from recsys.ranking import RANKING_MODELS
from recsys.ranking.dimensions import InputDimensions


def build_ranking(
    settings: RankingSettings, dimensions: InputDimensions, content: ContentSettings | None
) -> nn.Module:
    """Returns `Class(settings, dimensions, content)` of the class that `settings.name` names.

    Raises:
        ValueError: unknown name, or a class of the user's that cannot be imported or made.
    """
    return make_part(
        "ranking.name", settings.name, RANKING_MODELS, nn.Module, settings, dimensions, content
    )
