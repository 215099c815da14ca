"""Ranking models: ID vectors and content vectors -> logits.

`RANKING_MODELS` holds those of the package by the name that `ranking.name` gives. A class of your
own needs no entry: `ranking.name: package.module:Class` names it, and it is called as
`Class(settings, dimensions, content)`, with its own settings in `settings.options`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from recsys.config import ContentSettings, RankingSettings
from recsys.ranking.deepfm import DeepFM
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.din import Din
from recsys.ranking.din_dcn import DinDcn
from recsys.ranking.dlrm import Dlrm, DlrmDcn
from recsys.ranking.mmoe import Mmoe
from recsys.ranking.sim import Sim
from recsys.ranking.two_tower import TwoTower

__all__ = ["RANKING_MODELS", "build_ranking"]

RANKING_MODELS: dict[
    str, Callable[[RankingSettings, InputDimensions, ContentSettings | None], nn.Module]
] = {
    "din_dcn": DinDcn,
    "din": Din,
    "dlrm": Dlrm,
    "dlrm_dcn": DlrmDcn,
    "deepfm": DeepFM,
    "sim": Sim,
    "mmoe": Mmoe,
    "two_tower": TwoTower,
}


def build_ranking(
    settings: RankingSettings, dimensions: InputDimensions, content: ContentSettings | None
) -> nn.Module:
    """The ranking model a configuration names.

    Raises:
        ValueError: unknown name, or a class of the user's that cannot be imported or made.
    """
    if ":" in settings.name:
        return _own_model(settings, dimensions, content)
    if settings.name not in RANKING_MODELS:
        raise ValueError(
            f"ranking.name '{settings.name}' is unknown; choose one of {sorted(RANKING_MODELS)}, "
            "or name a class of your own as package.module:Class"
        )
    return RANKING_MODELS[settings.name](settings, dimensions, content)


def _own_model(
    settings: RankingSettings, dimensions: InputDimensions, content: ContentSettings | None
) -> nn.Module:
    module_name, _, attribute = settings.name.partition(":")
    try:
        build: Any = getattr(importlib.import_module(module_name), attribute)
        model = build(settings, dimensions, content)
    # The class is the user's: whatever it raises is told with the setting that named it.
    except Exception as error:
        raise ValueError(
            f"ranking.name '{settings.name}' cannot be made ({type(error).__name__}: {error}); it "
            "is called as Class(settings, dimensions, content)"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"ranking.name '{settings.name}' gave {type(model).__name__}, not a torch module"
        )
    return model
