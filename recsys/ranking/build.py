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
    """Return `Class(settings, dimensions, content)` for the class that `settings.name` names.

    Raises:
        ValueError: the name is unknown, or a user's class cannot be imported or constructed.
    """
    return make_part(
        "ranking.name", settings.name, RANKING_MODELS, nn.Module, settings, dimensions, content
    )
