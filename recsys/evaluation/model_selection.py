"""Selects the best of the models that a run validates: it is kept, tested and served.

AUC over all impressions is high if a model separates users, GAUC if it ranks within a user; in one
training they can peak at different steps. Their mean weights both.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from recsys.config import BestModelBy

METRICS: dict[BestModelBy, tuple[str, ...]] = {
    "auc": ("auc",),
    "gauc": ("gauc",),
    "auc_and_gauc": ("auc", "gauc"),
}


def selection_score(report: Mapping[str, Any], best_model_by: BestModelBy) -> float | None:
    """Return the mean of the metrics that choose the best model; None where one is undefined.

    Args:
        report: validation metrics by name.
        best_model_by: the setting of that name.

    Example::

        selection_score({"auc": 0.75, "gauc": 0.5}, "auc_and_gauc")  # 0.625
    """
    names = METRICS[best_model_by]
    known = [report[name] for name in names if report.get(name) is not None]
    return fmean(known) if len(known) == len(names) else None


def selection_words(best_model_by: BestModelBy) -> str:
    """Return the selection score in words, such as `mean of AUC and GAUC`."""
    names = [name.upper() for name in METRICS[best_model_by]]
    return names[0] if len(names) == 1 else f"mean of {' and '.join(names)}"
