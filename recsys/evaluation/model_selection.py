"""Selects the best of the models that a run validates: it is kept, tested and served.

AUC over all impressions is high if a model separates users, GAUC if it ranks within a user; in one
training they can peak at different steps. Their mean weights both. Recall and NDCG of a retrieval
model are those of a search of the whole catalogue, and need no negative rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from recsys.config import BestModelBy
from recsys.evaluation.regression import ERRORS

RETRIEVAL_DEPTH = 10  # of the recall and NDCG that choose a model
METRICS: dict[BestModelBy, tuple[str, ...]] = {
    "auc": ("auc",),
    "gauc": ("gauc",),
    "auc_and_gauc": ("auc", "gauc"),
    "recall": (f"recall@{RETRIEVAL_DEPTH}",),
    "ndcg": (f"ndcg@{RETRIEVAL_DEPTH}",),
    "rmse": ("rmse",),
    "mae": ("mae",),
}


def needs_search(best_model_by: BestModelBy) -> bool:
    """Return whether validation must search the catalogue to choose the best model."""
    return best_model_by in ("recall", "ndcg")


def selection_score(report: Mapping[str, Any], best_model_by: BestModelBy) -> float | None:
    """Return the mean of the metrics that choose the best model; None where one is undefined.

    The highest score is best: that of an error is negative.

    Args:
        report: validation metrics by name; those of a search under `retrieval`.
        best_model_by: the setting of that name.

    Example::

        selection_score({"auc": 0.75, "gauc": 0.5}, "auc_and_gauc")  # 0.625
    """
    names, values = METRICS[best_model_by], {**report.get("retrieval", {}), **report}
    known = [values[name] for name in names if values.get(name) is not None]
    if len(known) != len(names):
        return None
    return -fmean(known) if best_model_by in ERRORS else fmean(known)


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


# A log loss above this is absurd: twice that of predicting one half for every row, which is at
# least twice that of predicting the share of positives.
ABSURD_LOG_LOSS = 2 * math.log(2)


def check_log_loss(report: Mapping[str, Any], where: str, advice: str, slack: float = 1.0) -> None:
    """Check that a model's probabilities are of use, by the metrics of a split.

    Raises:
        ValueError: the log loss of a label is not finite, or above `ABSURD_LOG_LOSS` times `slack`;
            the message names the split (`where`) and the fix (`advice`).
    """
    for label, of_label in (report.get("labels") or {"": report}).items():
        loss = of_label.get("logloss")
        if loss is not None and not loss <= ABSURD_LOG_LOSS * slack:
            of = f" of label '{label}'" if label else ""
            raise ValueError(
                f"{where}: the log loss{of} of the best model is {loss:.4g}, above "
                f"{ABSURD_LOG_LOSS:.4g}, twice that of predicting one half for every row: the "
                f"model is of no use; {advice}"
            )


# An RMSE above this times that of always predicting the mean is absurd.
ABSURD_NRMSE = 2.0


def check_rmse(report: Mapping[str, Any], where: str, advice: str, slack: float = 1.0) -> None:
    """Check that a model's predictions of numbers are of use; arguments as for `check_log_loss`.

    Raises:
        ValueError: the RMSE of a label is above `ABSURD_NRMSE` times `slack`, relative to that of
            predicting the mean.
    """
    for label, of_label in (report.get("labels") or {"": report}).items():
        ratio = of_label.get("nrmse")
        if ratio is not None and not ratio <= ABSURD_NRMSE * slack:
            of = f" of label '{label}'" if label else ""
            raise ValueError(
                f"{where}: the RMSE{of} of the best model is {of_label['rmse']:.4g}, {ratio:.4g} "
                f"times that of always predicting the mean, above {ABSURD_NRMSE:g}: the model "
                f"is of no use; scale the label to about 1, train for longer, or {advice}"
            )
