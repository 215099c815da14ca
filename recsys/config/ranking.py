"""Settings of the ranking model, `ranking` in a recipe; a model's class names its `Settings`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_type_hints

from recsys.config.limits import Dropout, NonNegativeFloat, PositiveInt, Width, refuse_options
from recsys.config.named_parts import find_part
from recsys.config.parser import meant

logger = logging.getLogger(__name__)

RANKING_MODELS = {
    "din_dcn": "recsys.ranking.attention_models:DinDcn",
    "din": "recsys.ranking.attention_models:Din",
    "dlrm": "recsys.ranking.dlrm:Dlrm",
    "dlrm_dcn": "recsys.ranking.dlrm:DlrmDcn",
    "deepfm": "recsys.ranking.dlrm:DeepFM",
    "sim": "recsys.ranking.attention_models:Sim",
    "hstu": "recsys.ranking.attention_models:Hstu",
    "transformer": "recsys.ranking.attention_models:Transformer",
    "mmoe": "recsys.ranking.attention_models:Mmoe",
    "two_tower": "recsys.ranking.two_tower:TwoTower",
    "generative": "recsys.ranking.generative:Generative",
}
# Import paths of the models' `Settings`, such as DinSettings; importing these needs no torch.
RANKING_SETTINGS = {
    name: f"recsys.ranking.settings:{path.partition(':')[2]}Settings"
    for name, path in RANKING_MODELS.items()
}
DEFAULT_MODEL = "din_dcn"


@dataclass
class RankingSettings:
    """Settings that every ranking model has; `Settings` of a model derives from it."""

    name: str = DEFAULT_MODEL
    """One of recsys.ranking.RANKING_MODELS, or a class of your own as `package.module:Class`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a class of your own that has no `Settings`."""
    mlp_units: list[Width] = field(default_factory=lambda: [128, 64])
    """Units of the model's last hidden layers."""
    dropout: Dropout = 0.3
    """Dropout after each of these layers."""
    label_weights: dict[str, NonNegativeFloat] = field(default_factory=dict)
    """Weights of the labels' losses, by column; default 1."""
    scale_inputs: bool = True
    """Standardise dense columns, and lists of numbers beside histories, that have a training value
    outside of [-3, 3], by the training rows' mean and variance. Other columns stay as they are."""
    further_histories: Literal["attention", "mean"] = "attention"
    """Encoder of each sequence after the first into one vector: the target attention of DIN, or the
    mean of its events."""

    def check(self, name: str) -> None:
        refuse_options(name, self.name, self.options)


RetrievalLossName = Literal[
    "pointwise", "in_batch_softmax", "sampled_softmax", "full_softmax", "codes"
]


@dataclass
class RetrievalSettings(RankingSettings):
    """Settings of models that compare vectors of users and items, for retrieval."""

    further_histories: Literal["mean"] = "mean"
    """Encoder of each sequence after the first into one vector. With attention, the user's vector
    would depend on the item."""
    loss: RetrievalLossName = "pointwise"
    """pointwise: cross-entropy of the labels; else cross-entropy of the target item against the
    items of the batch, sampled items, or all items with training rows (for small catalogues)."""
    num_negatives: PositiveInt = 256
    """Negatives of sampled_softmax, per rank and step."""
    log_q_correction: bool = True
    """Softmax losses: correct scores by the probability of negatives. false leaves popularity out
    of the scores, so that rare and new items are retrieved."""
    all_ranks: bool = False
    """Softmax losses: take the negatives of every rank."""
    depths: list[PositiveInt] = field(default_factory=lambda: [10, 50, 100])
    """Lengths of the lists whose recall, NDCG and MRR are measured by a search of all items."""
    exclude_seen: bool = False
    """Leave the items of a row's history out of that search, besides its own item, and out of the
    negatives of softmax losses: for logs where users take an item once."""
    available_from: str | None = None
    """Column of items/*.parquet with the moment, a time or number, from which each item may be
    retrieved: later items are left out of that search. An item with null is always available."""
    row_time: str = "time"
    """Column of the rows with the moment of each, to compare with `available_from`."""

    def check(self, name: str) -> None:
        super().check(name)
        if not self.depths or sorted(set(self.depths)) != list(self.depths):
            raise ValueError(f"{name}.depths: {self.depths}; write them once, in ascending order")
        if (self.loss == "codes") != (self.name == "generative"):
            raise ValueError(
                f"{name}.loss: '{self.loss}' is no loss of {self.name}; generative has codes, "
                "which no other model has"
            )
        if self.loss == "full_softmax" and self.all_ranks:
            raise ValueError(
                f"{name}.all_ranks: full_softmax has all items on each rank; set all_ranks to false"
            )


def softmax_settings(ranking: RankingSettings) -> RetrievalSettings | None:
    """Return the settings of a loss over items, such as a softmax; None for a loss per label."""
    if isinstance(ranking, RetrievalSettings) and ranking.loss != "pointwise":
        return ranking
    return None


def settings_class(name: str) -> type[RankingSettings]:
    """Return the dataclass of a ranking model's settings.

    A user's class without `Settings` has `options` and the settings of retrieval.
    """
    if name in RANKING_SETTINGS:
        settings: type[RankingSettings] = find_part("ranking.name", name, RANKING_SETTINGS)
    else:
        model = find_part("ranking.name", name, RANKING_MODELS)
        settings = getattr(model, "Settings", RetrievalSettings)
    if not (is_dataclass(settings) and issubclass(settings, RankingSettings)):
        raise ValueError(
            f"ranking.name '{name}': its Settings are no dataclass that derives from "
            "recsys.config.RankingSettings; derive them from it"
        )
    # jsonargparse would resolve inherited annotations in the module of the inheriting class.
    settings.__init__.__annotations__ = get_type_hints(settings)
    return settings


def ranking_settings(name: str = DEFAULT_MODEL, **settings: Any) -> RankingSettings:
    """Build the settings of a ranking model; an unknown name or setting is a ValueError."""
    kind = settings_class(name)
    check_keys(settings, name)
    return kind(name=name, **settings)


def keys_of(name: str) -> list[str]:
    """Return the names of a ranking model's settings."""
    return [item.name for item in fields(settings_class(name))]


def check_keys(keys: Iterable[str], name: str) -> None:
    """Raise a ValueError for keys that a ranking model lacks; the message lists its settings."""
    names = keys_of(name)
    for key in keys:
        if (plain := key.removesuffix("+")) not in names:
            raise ValueError(
                f"ranking.{key} is no setting of '{name}'{meant(plain, names) or '; remove it'} "
                f"(its settings: {names})"
            )


def for_model(recipe: Any, name: str, warn: bool = False) -> Any:
    """Return a recipe whose `ranking` has only settings of the ranking model `name`.

    Settings that only the recipe's own model has are dropped, with a warning if `warn`; others
    raise.
    """
    section = recipe.get("ranking") if isinstance(recipe, dict) else None
    if not isinstance(section, dict):
        return recipe
    names, recipe_model = keys_of(name), str(section.get("name", DEFAULT_MODEL))
    foreign = [key for key in section if key not in names]
    if foreign:
        recipe_names = [] if recipe_model == name else keys_of(recipe_model)
        check_keys([key for key in foreign if key not in recipe_names], name)
        if warn:
            logger.warning(
                f"ranking.{', ranking.'.join(foreign)}: set for '{recipe_model}' in the recipe, "
                f"and left out, as '{name}' has no such settings"
            )
    return recipe | {"ranking": {key: value for key, value in section.items() if key in names}}
