"""Selects the best of the models that a run validates: it is kept, tested and served.

AUC over all impressions is high if a model separates users, GAUC if it ranks within a user; in one
training they can peak at different steps. Their mean weights both. Recall and NDCG of a retrieval
model are those of a search of the whole catalogue, and need no negative rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from recsys.config import BestModelBy

RETRIEVAL_DEPTH = 10  # of the recall and NDCG that choose a model
METRICS: dict[BestModelBy, tuple[str, ...]] = {
    "auc": ("auc",),
    "gauc": ("gauc",),
    "auc_and_gauc": ("auc", "gauc"),
    "recall": (f"recall@{RETRIEVAL_DEPTH}",),
    "ndcg": (f"ndcg@{RETRIEVAL_DEPTH}",),
}


def needs_search(best_model_by: BestModelBy) -> bool:
    """Return whether validation must search the catalogue to choose the best model."""
    return best_model_by in ("recall", "ndcg")


def selection_score(report: Mapping[str, Any], best_model_by: BestModelBy) -> float | None:
    """Return the mean of the metrics that choose the best model; None where one is undefined.

    Args:
        report: validation metrics by name; those of a search under `retrieval`.
        best_model_by: the setting of that name.

    Example::

        selection_score({"auc": 0.75, "gauc": 0.5}, "auc_and_gauc")  # 0.625
    """
    names, values = METRICS[best_model_by], {**report.get("retrieval", {}), **report}
    known = [values[name] for name in names if values.get(name) is not None]
    return fmean(known) if len(known) == len(names) else None


def selection_words(best_model_by: BestModelBy) -> str:
    """Return the selection score in words, such as `mean of AUC and GAUC`."""
    names = [name.upper() for name in METRICS[best_model_by]]
    return names[0] if len(names) == 1 else f"mean of {' and '.join(names)}"


def tracked_name(metric: str) -> str:
    """Return the name of a metric in trackers, some of which accept no `@`.

    Example::

        tracked_name("recall@10")  # "recall_at_10"
    """
    return metric.replace("@", "_at_")
