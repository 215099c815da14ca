"""The cells of the quality study: their changes to the recipe, reasons and baselines.

The difference of a cell to its baseline is the effect of one part; all other settings are equal.
Cells whose settings are equal under a recipe share their runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recsys.config.ranking import keys_of

Settings = Mapping[str, Any]  # by full name, such as `content.fusion.name`


@dataclass(frozen=True)
class Cell:
    """One configuration of the grid: its changes to the recipe, and its baseline cell."""

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
NO_NEIGHBOURS: Settings = {"neighbours": None}
NO_SIMILARITY: Settings = {
    **NO_NEIGHBOURS,  # they compare the modalities, as the features do
    "content.history.similarity_features": False,
    "content.history.simtier_bins": 0,
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
NONE: Settings = {}
STORED: Settings = {
    **CONCAT,
    **NO_SIMILARITY,
    "content.modalities.text.training": "frozen",
    "content.history.mode": "bank_frozen",
}
SIMTIER: Settings = {**STORED, "content.history.simtier_bins": 20}
STATISTICS_OF_USERS: Settings = {"neighbours.time": None}
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
    name: str,
    reason: str,
    baseline: str,
    training: str,
    top_layers: int = 0,
    changes: Settings = NONE,
) -> Cell:
    """Return the cell of a way to train the text encoder."""
    settings: dict[str, Any] = {
        **SHORT_TEXT,
        "content.modalities.text.training": training,
        **changes,
    }
    if top_layers:
        settings["content.modalities.text.lora.top_layers"] = top_layers
    return Cell(f"text {name}", reason, settings, baseline)


def backbone(name: str) -> list[Cell]:
    """Return the cells of a ranking backbone without and with content, with equal heads."""
    options = set(keys_of(name))
    equal_heads = {
        f"ranking.{key}": value
        for key, value in {
            "ensemble_members": 1,
            "standardize_numbers": False,
        }.items()
        if key in options
    }
    settings = {"ranking.name": name, **equal_heads}
    return [
        Cell(f"{name}, ID only", "the backbone without content", {**settings, "content": "none"}),
        Cell(name, "the backbone with the recipe's content", settings, f"{name}, ID only"),
    ]


ID_ONLY = Cell(
    "ID only", "the baseline without content: what ids alone can do", {"content": "none"}
)
RECIPE = Cell(
    "recipe",
    "the recipe as it stands: ConcatFusion lacks its similarity features and neighbours",
    {},
    "ID only",
)
PARTS = [
    ID_ONLY,
    Cell(
        "stored features",
        "outputs of frozen encoders, projected and appended to the ID vectors. The ranking model "
        "always attends to the history's content too; here by a dot product over a frozen bank, "
        "which is the least it can do",
        {**STORED, **NO_CIC},
        "ID only",
    ),
    *with_cic(
        "SimTier histogram",
        "stored features and a histogram of the target's cosines to the history: the strongest "
        "cheap baseline in the literature",
        SIMTIER,
        "stored features",
    ),
    *with_cic(
        "ConcatFusion",
        "one linear map of the modalities side by side, and the recipe's trained map over the "
        "history: content as most would add it",
        {**CONCAT, **NO_SIMILARITY},
        "stored features",
    ),
    RECIPE,
    *with_cic(RECIPE.name, RECIPE.reason, {}, "ID only")[1:],
    *with_cic(
        "FQ-Former published",
        "the Fusion-Q-Former as the authors published it, in place of the recipe's linear map",
        qformer("published"),
        "recipe",
    ),
    *with_cic(
        "FQ-Former modern",
        "the Fusion-Q-Former with pre-norm, feed-forward and modality embedding, which adds to the "
        "linear map",
        qformer("modern"),
        "recipe",
    ),
]
HISTORY = [
    history("bank_frozen", "vectors of the bank, through no trained map", "ID only"),
    *(
        history("bank_lora", "a low-rank map over them", "history bank_frozen", rank)
        for rank in (2, 4, 8, 16, 32)
    ),
    history("bank_dense", "a dense map over them", "history bank_frozen"),
    history("full", "history items encoded with gradient, without a bank", "history bank_dense"),
]
TEXT = [
    text(
        "frozen",
        "the text encoder as it comes; like all of these, 24 tokens of text",
        "ID only",
        "frozen",
    ),
    text("LoRA top 1", "adapters in its highest layer", "text frozen", "lora", 1),
    text("LoRA top 2", "adapters in its two highest layers", "text frozen", "lora", 2),
    text("LoRA all", "adapters in all six layers", "text frozen", "lora", 6),
    text("full", "all its weights train", "text frozen", "full"),
    text(
        "LoRA top 1, a fifth",
        "the encoder runs for a fifth of a step's items, the others take their last outputs",
        "text LoRA top 1",
        "lora",
        1,
        {"content.encoder_share": 0.2},
    ),
]
OTHER_CELLS = [
    Cell(
        "text tokens",
        "the Fusion-Q-Former, its queries attending to every token of the text, not to their mean",
        TEXT_TOKENS,
        "FQ-Former modern",
    ),
    Cell(
        "all tokens",
        "the same for text, title and genres, and for the 16 places of the poster",
        ALL_TOKENS,
        "FQ-Former modern",
    ),
    Cell(
        "no table of users",
        "the recipe without vectors of users: a user is the history alone",
        {"embedding.tables": {"item": {"new_rows": "mean"}}, "embedding.skip": ["user"]},
        "recipe",
    ),
    Cell(
        "users without id_dropout",
        "the recipe, its vectors of users never left out",
        {"embedding.tables.user.id_dropout": 0},
        "recipe",
    ),
    Cell(
        "no neighbours",
        "the recipe without kernel regression and votes of similar items",
        NO_NEIGHBOURS,
        "recipe",
    ),
    Cell(
        "statistics of other users",
        "the recipe, training rows read later histories of other users, too",
        STATISTICS_OF_USERS,
        "recipe",
    ),
    Cell("no averages", "the recipe without weight averaging (EMA)", NO_AVERAGES, "recipe"),
    Cell("random new rows", "the recipe, new items' ID rows at random", RANDOM_ROWS, "recipe"),
    Cell(
        "previous recipe",
        "the Fusion-Q-Former, without neighbours, averages or rows made of content",
        {**qformer("modern"), **NO_NEIGHBOURS, **NO_AVERAGES, **RANDOM_ROWS},
        "recipe",
    ),
    *with_cic(
        "two towers",
        "the recipe as a model of retrieval: user and item meet in one product alone",
        {"ranking.name": "two_tower", **NO_NEIGHBOURS},
        "recipe",
    )[:2],
    *(
        Cell(
            name,
            "the recipe with a sequence model in place of target attention",
            {"ranking.name": name, "ranking.time_gaps": "history_days"},
            "recipe",
        )
        for name in ("hstu", "transformer")
    ),
    Cell(
        "one MLP",
        "the recipe with one MLP in place of the ensemble",
        {"ranking.ensemble_members": 1},
        "recipe",
    ),
    Cell(
        "numbers as they are",
        "the recipe without standardisation of similarities and what the history's lists say",
        {"ranking.standardize_numbers": False},
        "recipe",
    ),
]
TEXTS = ("title", "tags", "description")  # of recsys/recipes/ifdb.yaml
OTHER_TERMS = ("author", "genre", "system")  # beside tags


def encoders(training: str, top_layers: int = 0, share: float = 1.0) -> Settings:
    """Return the settings that train the encoder of each text of the recipe for implicit logs.

    `share`: of a step's items for which encoders run; the others take their last outputs.
    """
    settings: dict[str, Any] = {f"content.modalities.{name}.training": training for name in TEXTS}
    # The default leaves new adapters as they are within two epochs, and changes all weights much.
    rates = {"side": 5e-4, "lora": 1e-3, "full": 5e-5}
    settings["optimizer.encoder_learning_rate"] = rates[training]
    if top_layers:
        settings |= {f"content.modalities.{name}.lora.top_layers": top_layers for name in TEXTS}
    if share < 1:
        settings["content.encoder_share"] = share
    return settings


def without(*modalities: str) -> Settings:
    """Return the settings that leave out modalities of the recipe."""
    return {f"content.modalities.{name}": None for name in modalities}


FROZEN = Cell(
    "frozen", "the recipe: frozen encoders, their mean tokens, a linear map", {}, "ID only"
)
IMPLICIT = [
    ID_ONLY,
    FROZEN,
    Cell("no terms", "without bags of terms", without("terms", *OTHER_TERMS), "frozen"),
    Cell(
        "tags alone",
        "without the bags of author, genre and system",
        without(*OTHER_TERMS),
        "frozen",
    ),
    Cell(
        "trained terms",
        "embeddings of tags train",
        {"content.modalities.terms.training": "full", "optimizer.encoder_learning_rate": 1e-3},
        "frozen",
    ),
    Cell("side tuning", "a network over the states of all layers", encoders("side"), "frozen"),
    Cell(
        "no latest items",
        "the recipe with similarities to the whole history alone",
        {"content.history.recent": []},
        "frozen",
    ),
    Cell("Fusion-Q-Former", "in place of the linear map", qformer("modern"), "frozen"),
    Cell("CIC", "with all items of the batch as negatives, weight 0.05", IN_BATCH, "frozen"),
    Cell("Fusion-Q-Former + CIC", "both", {**qformer("modern"), **IN_BATCH}, "frozen"),
    Cell(
        "no neighbours", "the recipe without similar items of the history", NO_NEIGHBOURS, "frozen"
    ),
    Cell(
        "statistics of other users",
        "training rows read later histories of other users, too",
        STATISTICS_OF_USERS,
        "frozen",
    ),
    Cell("no knots", "counts as they are alone", {"ranking.number_knots": 0}, "frozen"),
    Cell(
        "ID vectors kept",
        "every target of training with its ID vector",
        {"embedding.tables.item.id_dropout": 0},
        "frozen",
    ),
    Cell("random new rows", "ID rows of new items at random", RANDOM_ROWS, "frozen"),
    Cell(
        "mean new rows",
        "ID rows of new items as the mean of all rows",
        {"embedding.tables.item.new_rows": "mean"},
        "frozen",
    ),
    Cell(
        "frozen history",
        "the history's content without a trained map",
        {"content.history.mode": "bank_frozen"},
        "frozen",
    ),
    Cell(
        "LoRA top layer",
        "adapters in the highest layer of each encoder, run for a quarter of a step's items",
        encoders("lora", 1, 0.25),
        "frozen",
    ),
    Cell(
        "LoRA all layers",
        "adapters in all six layers, run for a twentieth of a step's items",
        encoders("lora", 6, 0.05),
        "frozen",
    ),
    Cell(
        "full",
        "all weights of the encoders train, run for a twentieth of a step's items",
        encoders("full", share=0.05),
        "frozen",
    ),
]
BACKBONES = ("din_dcn", "din", "dlrm", "dlrm_dcn", "deepfm", "sim", "mmoe", "hstu", "transformer")
GRIDS: dict[str, list[Cell]] = {
    "parts": PARTS,
    "history": [ID_ONLY, *HISTORY],
    "text": [ID_ONLY, *TEXT],
    "backbones": [cell for name in BACKBONES for cell in backbone(name)],
    "full": [*PARTS, *HISTORY, *TEXT, *OTHER_CELLS],
    "ifdb": IMPLICIT,
}
PEERS = ("stored features", "SimTier histogram", "ConcatFusion", "FQ-Former modern")


def chosen_cells(grid: str, only: Sequence[str] | None = None) -> list[Cell]:
    """Return the cells of a grid, or only those that are named.

    Raises:
        ValueError: there is no such grid or cell.
    """
    if grid not in GRIDS:
        raise ValueError(f"--grid {grid} is unknown; choose one of {list(GRIDS)}")
    cells = {cell.name: cell for cell in GRIDS[grid]}
    names = list(cells) if only is None else only
    unknown = sorted(set(names) - set(cells))
    if unknown:
        raise ValueError(f"--only: {unknown} are not in grid {grid}; choose of {list(cells)}")
    return [cell for name, cell in cells.items() if name in names]
