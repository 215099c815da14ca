"""Shows quality by an item's training impressions, since ID vectors of rare items are untrained.

Shapes: N rows of the split, I items.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from recsys.diagnostics.run_report.page import (
    BLUE,
    ORANGE,
    Drawing,
    Section,
    Table,
    drawn,
    new_figure,
)
from recsys.evaluation.metrics import RankedRows, RegressionRows, marked_cell, rows_of_loss
from recsys.evaluation.scores import SplitScores

# Least and most training impressions of an item by bucket.
BUCKETS = {"0": (0, 0), "1–4": (1, 4), "5–19": (5, 19), "20–99": (20, 99), "100+": (100, np.inf)}
NAMES = {"auc": "AUC", "gauc": "GAUC", "logloss": "log loss"}
NAMES_OF_NUMBERS = {"rmse": "RMSE", "mae": "MAE"}
UNTRAINED = (
    "An item without training impressions has an untrained ID vector: the model knows it only by "
    "its content, its other features and the user."
)


def metrics_by_count(
    rows: RankedRows | RegressionRows,
    counts: np.ndarray,  # int64 [N], training impressions of the row's item
) -> dict[str, dict[str, Any]]:
    """Return the metrics of each bucket."""
    return {
        name: rows.metrics((counts >= least) & (counts <= most))
        for name, (least, most) in BUCKETS.items()
    }


def item_popularity(scores: SplitScores, split: str) -> Section:
    """Return the section with figure and table, of rows that count for label 0."""
    loss, columns = scores.loss_of(0), (scores.labels[:, 0], scores.logits[:, 0], scores.groups)
    rows = rows_of_loss(*columns, scores.weights, loss)
    buckets = metrics_by_count(rows, scores.counts)
    names = NAMES if loss == "bce" else NAMES_OF_NUMBERS
    table = Table(
        ("training impressions", *names.values(), "rows"),
        [
            (
                name,
                *(marked_cell(values, metric, "–") for metric in names),
                f"{values['num_samples']:,}",
            )
            for name, values in buckets.items()
        ],
    )
    if loss != "bce":
        return Section("Quality by item popularity", [UNTRAINED], [], [table])
    words, drawings = [UNTRAINED], []
    if any(values["auc"] is not None for values in buckets.values()):
        drawings = [_bars(buckets, split)]
    else:
        words.append("No figure: the items of each range have rows of one label only.")
    return Section("Quality by item popularity", words, drawings, [table])


def _bars(buckets: dict[str, dict[str, Any]], split: str) -> Drawing:
    figure, (axes,) = new_figure(1)
    places = np.arange(len(buckets))
    for shift, name, colour in ((-0.2, "auc", BLUE), (0.2, "gauc", ORANGE)):
        heights = [
            values[name] if values[name] is not None else np.nan for values in buckets.values()
        ]
        axes.bar(places + shift, heights, 0.38, color=colour, label=name.upper())
        for place, height in zip(places + shift, heights):
            if not np.isnan(height):
                inside = "white" if height > 0.1 else "black"
                axes.text(place, 0.03, f"{height:.3f}", ha="center", color=inside)
    axes.axhline(0.5, color="black", linewidth=1)
    names = [f"{name}\n{values['num_samples']:,} rows" for name, values in buckets.items()]
    axes.set_xticks(places, names)
    axes.set(
        title="Are rare and new items ranked as well as frequent ones?",
        xlabel="training impressions of the item",
        ylim=(0, 1),
    )
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    caption = (
        f"AUC and GAUC of the {split} split by the item's training impressions. The line at 0.5 is "
        "chance; a bar is missing where the rows have one label only. `recsys compare` tests "
        "differences of two models."
    )
    return drawn("quality-by-popularity", figure, caption)
