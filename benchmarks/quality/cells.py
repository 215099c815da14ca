"""A cell of the quality study, and what cells share: settings, and cells of one pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Settings = Mapping[str, Any]  # by full name, such as `content.fusion.name`


@dataclass(frozen=True)
class Cell:
    """One configuration of the grid.

    name: name in tables and figures.
    reason: the purpose, in a line.
    settings: its changes to the recipe.
    baseline: the cell that it is compared with.
    """

    name: str
    reason: str
    settings: Settings = field(hash=False)
    baseline: str | None = None


def qformer(preset: str) -> Settings:
    """Return the settings of the Fusion-Q-Former with a preset."""
    return {"content.fusion.name": "qformer", "content.fusion.preset": preset}


NO_CIC: Settings = {"contrastive.weight": 0}
IN_BATCH: Settings = {
    "contrastive.variant": "in_batch",
    "contrastive.weight": 0.05,
    "contrastive.temperature": 0.1,
}
PUBLISHED: Settings = {
    "contrastive.variant": "published",
    "contrastive.weight": 0.001,
    "contrastive.num_negatives": 16,
    "contrastive.temperature": 0.1,
    "contrastive.normalize": True,
}
NO_SIMILARITY: Settings = {
    "content.history.similarity_features": False,
    "content.history.simtier_bins": 0,
    "content.history.sorted_cosines": 0,
}
CONCAT: Settings = {"content.fusion.name": "concat"}
SHORT_TEXT: Settings = {"content.modalities.text.max_length": 24}  # training its encoder is costly
TEXT_TOKENS: Settings = {**qformer("modern"), "content.modalities.text.pooling": "none"}
ALL_TOKENS: Settings = {
    **TEXT_TOKENS,
    **{f"content.modalities.{name}.pooling": "none" for name in ("text", "title", "genres")},
    "content.modalities.poster.module": (
        "recsys.content.encoders.efficientnet:efficientnet_lite0_patches"
    ),
}
SAMPLING: Settings = {"content.sampling.forward": 0.2, "content.sampling.backward": 0.2}
SAMPLED = "a fifth of the items is encoded in each step, the others come from the bank (LEMUR)"
NONE: Settings = {}
STORED: Settings = {
    **CONCAT,
    **NO_SIMILARITY,
    "content.modalities.text.training": "frozen",
    "content.history.mode": "bank_frozen",
}
SIMTIER: Settings = {**STORED, "content.history.simtier_bins": 20}


NO_VOTES: Settings = {"ranking.opinions": None, "ranking.opinion_dropout": 0.0}
NO_AVERAGES: Settings = {"optimizer.ema_decay": None, "optimizer.ema_tables": False}
RANDOM_ROWS: Settings = {"embedding.tables.item.new_rows": "random"}


def with_cic(name: str, reason: str, settings: Settings, baseline: str) -> list[Cell]:
    """Return the cell without CIC, and the cells with each variant."""
    return [
        Cell(name, reason, {**settings, **NO_CIC}, baseline),
        Cell(
            f"{name} + CIC in_batch",
            "CIC with all items of the batch as negatives, weight 0.05",
            {**settings, **IN_BATCH},
            name,
        ),
        Cell(
            f"{name} + CIC published",
            "CIC as the authors published it: 16 sampled negatives, weight 0.001",
            {**settings, **PUBLISHED},
            name,
        ),
    ]


def history(mode: str, reason: str, baseline: str, rank: int = 0) -> Cell:
    """Return the cell of a history mode; `rank`: of a low-rank map."""
    settings: dict[str, Any] = {"content.history.mode": mode}
    if not rank:
        return Cell(f"history {mode}", reason, settings, baseline)
    settings["content.history.lora_rank"] = rank
    settings["content.history.lora_alpha"] = 2.0 * rank  # the map's scale, alpha / rank, stays
    return Cell(f"history {mode} rank {rank}", reason, settings, baseline)


def text(
    name: str, reason: str, baseline: str, training: str, top_layers: int = 0, more: Settings = NONE
) -> Cell:
    """Return the cell of a way to train the text encoder."""
    settings: dict[str, Any] = {**SHORT_TEXT, "content.modalities.text.training": training, **more}
    if top_layers:
        settings["content.modalities.text.lora.top_layers"] = top_layers
    return Cell(f"text {name}", reason, settings, baseline)
