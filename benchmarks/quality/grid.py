"""The cells of the quality study: their changes to the recipe, reasons and baselines.

The difference of a cell to its baseline is the effect of one named part. All other settings are
the recipe's, so that data, batch size, epochs and the rule of early stopping are the same for
all. Cells that a recipe makes equal, such as the recipe and the rank it has, share their runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.quality.cells import (
    ALL_TOKENS,
    CONCAT,
    NO_AVERAGES,
    NO_CIC,
    NO_SIMILARITY,
    NO_VOTES,
    RANDOM_ROWS,
    SAMPLED,
    SAMPLING,
    SIMTIER,
    STORED,
    TEXT_TOKENS,
    Cell,
    history,
    qformer,
    text,
    with_cic,
)

ID_ONLY = Cell("ID only", "the twin without content: what ids alone can do", {"content": "none"})
RECIPE = Cell(
    "recipe",
    "the recipe as it stands: from ConcatFusion it differs by similarity features",
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
    text("LoRA top 1, sampling 20 %", SAMPLED, "text LoRA top 1", "lora", 1, SAMPLING),
]
OTHERS = [
    Cell("sampling 20 %", SAMPLED, SAMPLING, "recipe"),
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
        {"embedding.tables": {"item": {"new_rows": "content"}}, "embedding.skip": ["user"]},
        "recipe",
    ),
    Cell(
        "users without id_dropout",
        "the recipe, its vectors of users never left out",
        {"embedding.tables.user.id_dropout": 0},
        "recipe",
    ),
    Cell("no votes", "the recipe without votes of those who rated alike", NO_VOTES, "recipe"),
    Cell("no averages", "the recipe without averages of weights and tables", NO_AVERAGES, "recipe"),
    Cell("random new rows", "the recipe, new items' ID rows at random", RANDOM_ROWS, "recipe"),
    Cell(
        "no votes, averages or made rows",
        "the recipe without all three: a network's last weights alone",
        {**NO_VOTES, **NO_AVERAGES, **RANDOM_ROWS},
        "recipe",
    ),
    Cell(
        "recipe before",
        "the recipe of before: the Fusion-Q-Former, without votes, averages or made rows",
        {**qformer("modern"), **NO_VOTES, **NO_AVERAGES, **RANDOM_ROWS},
        "recipe",
    ),
    *with_cic(
        "two towers",
        "the recipe as a model of retrieval: user and item meet in one product alone",
        {"ranking.name": "two_tower"},
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
GRIDS: dict[str, list[Cell]] = {
    "parts": PARTS,
    "history": [ID_ONLY, *HISTORY],
    "text": [ID_ONLY, *TEXT],
    "full": [*PARTS, *HISTORY, *TEXT, *OTHERS],
}
# Peers that the recipe is compared with directly.
PEERS = ("stored features", "SimTier histogram", "ConcatFusion", "FQ-Former modern")
# Cells whose curves are drawn, few enough to be distinguishable.
DRAWN = (
    "ID only",
    "stored features",
    "SimTier histogram",
    "ConcatFusion",
    "recipe",
    "FQ-Former modern",
    "FQ-Former modern + CIC in_batch",
)


def chosen_cells(grid: str, only: Sequence[str] | None = None) -> list[Cell]:
    """Return the cells of a grid, or only those that are named.

    Raises:
        ValueError: there is no such grid or cell.

    Example::

        [cell.name for cell in chosen_cells("text", ["text full"])]  # ["text full"]
    """
    if grid not in GRIDS:
        raise ValueError(f"--grid {grid} is unknown; choose one of {list(GRIDS)}")
    cells = {cell.name: cell for cell in GRIDS[grid]}
    names = list(cells) if only is None else only
    unknown = sorted(set(names) - set(cells))
    if unknown:
        raise ValueError(f"--only: {unknown} are not in grid {grid}; choose of {list(cells)}")
    return [cell for name, cell in cells.items() if name in names]
