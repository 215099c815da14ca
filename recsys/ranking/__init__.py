"""Ranking models: ID vectors and content vectors -> logits.

`RANKING_MODELS` is a plain dict: add your own `name -> builder(settings, dimensions, content)`
and name it in `ranking.name`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from recsys.config import ContentSettings, RankingSettings
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.din_dcn import DinDcn

RANKING_MODELS: dict[
    str, Callable[[RankingSettings, InputDimensions, ContentSettings | None], nn.Module]
] = {"din_dcn": DinDcn}


def build_ranking(
    settings: RankingSettings, dimensions: InputDimensions, content: ContentSettings | None
) -> nn.Module:
    """The ranking model a configuration names.

    Raises:
        ValueError: unknown name.
    """
    if settings.name not in RANKING_MODELS:
        raise ValueError(
            f"ranking.name '{settings.name}' is unknown; choose one of {sorted(RANKING_MODELS)}"
        )
    return RANKING_MODELS[settings.name](settings, dimensions, content)
