"""Select the best of the models that a run validates, and refuse a useless one."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from recsys.config import BestModelBy

if TYPE_CHECKING:
    from recsys.data.row_source import RowSource
    from recsys.storage.location import Location

logger = logging.getLogger(__name__)

RETRIEVAL_DEPTH = 10  # K of the recall@K and NDCG@K that choose a model
METRICS: dict[BestModelBy, tuple[str, ...]] = {
    "auc": ("auc",),
    "gauc": ("gauc",),
    "auc_and_gauc": ("auc", "gauc"),
    "all_and_unseen": ("auc", "gauc", "auc_unseen", "gauc_unseen"),
    "recall": (f"recall@{RETRIEVAL_DEPTH}",),
    "ndcg": (f"ndcg@{RETRIEVAL_DEPTH}",),
    "rmse": ("rmse",),
    "mae": ("mae",),
}
MEANS_OF_DEFINED = ("auc_and_gauc", "all_and_unseen")  # only AUC must be defined
ABSURD_LOG_LOSS = 2 * math.log(2)  # twice the log loss of predicting 0.5 for every row
ABSURD_NRMSE = 2.0  # RMSE as a multiple of the RMSE of always predicting the mean
MAX_NAMED = 5  # largest number of columns in an error message


def needs_search(metric: BestModelBy) -> bool:
    """Return whether validation must search the catalogue to choose the best model."""
    return metric in ("recall", "ndcg")


def selection_score(report: Mapping[str, Any], metric: BestModelBy) -> float | None:
    """Return the score that chooses the best model, the higher the better; None if undefined.

    `auc_and_gauc` and `all_and_unseen` leave out undefined metrics beside AUC: GAUC, if no user has
    rows of both labels, and those of unseen items, if no row has one.
    """
    names, values = METRICS[metric], flat_metrics(report)
    scores = [values[name] for name in names if values.get(name) is not None]
    if len(scores) != len(names) and (metric not in MEANS_OF_DEFINED or values.get("auc") is None):
        return None
    return -fmean(scores) if metric in ("rmse", "mae") else fmean(scores)


def flat_metrics(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of all rows by name, and `auc_unseen` and `gauc_unseen` of new items."""
    unseen = {f"{name}_unseen": report.get("unseen", {}).get(name) for name in ("auc", "gauc")}
    return {**unseen, **report.get("retrieval", {}), **report}


def warn_of_undefined(root: Location, report: Mapping[str, Any], metric: BestModelBy) -> None:
    """Warn if `all_and_unseen` cannot see unseen items, as no validation row has one."""
    if metric == "all_and_unseen" and flat_metrics(report)["auc_unseen"] is None:
        logger.warning(
            "%s/valid: AUC of unseen items is not defined: all rows alone choose the best model; "
            "use a validation split with unseen items, or set best_model_by: auc_and_gauc",
            root,
        )


def selection_text(metric: BestModelBy) -> str:
    """Return the selection score in words, such as `mean of AUC and GAUC`."""
    if metric == "all_and_unseen":
        return "mean of AUC and GAUC, of all rows and of unseen items"
    names = [name.upper() for name in METRICS[metric]]
    return names[0] if len(names) == 1 else f"mean of {' and '.join(names)}"


def tracked_name(metric: str) -> str:
    """Return the name of a metric for trackers, some of which reject `@`: recall_at_10."""
    return metric.replace("@", "_at_")


def require_useful(
    report: Mapping[str, Any],
    where: str,
    rows: Callable[[], RowSource],
    consequence: str,
    slack: float = 1.0,
) -> None:
    """Raise a ValueError if a split's metrics show that a model's predictions are useless."""
    for name, metrics in (report.get("labels") or {"": report}).items():
        label = f" of label '{name}'" if name else ""
        loss, nrmse, problem = metrics.get("logloss"), metrics.get("nrmse"), None
        if loss is not None and not loss <= ABSURD_LOG_LOSS * slack:
            problem = (
                f"the log loss{label} of the best model is {loss:.4g}, above "
                f"{ABSURD_LOG_LOSS:.4g}, twice that of predicting one half for every row: the "
                "model is of no use; "
            )
        elif nrmse is not None and not nrmse <= ABSURD_NRMSE * slack:
            problem = (
                f"the RMSE{label} of the best model is {metrics['rmse']:.4g}, {nrmse:.4g} times "
                f"that of always predicting the mean, above {ABSURD_NRMSE:g}: the model is of no "
                "use; scale the label to about 1, train for longer, or "
            )
        if problem is not None:
            raise ValueError(f"{where}: {problem}{_advice(rows())}. {consequence}")


def slack_for(num_rows: int) -> float:
    """Return the `slack` for a split that did not choose the model: the loss of few rows varies."""
    return 1 + 10 / math.sqrt(max(num_rows, 1))


def _advice(rows: RowSource) -> str:
    from recsys.data.item_frequency import NumberRanges

    ranges = NumberRanges(rows.schema)
    for table in rows.read(*rows.share(0, 1)):
        ranges.add(table)
    wide = [(name, column) for name, column in ranges.by_column.items() if column.is_wide]
    if not wide:
        return "look at columns and modalities (`recsys explain-data`), or lower the learning rates"
    wide.sort(key=lambda item: -max(-item[1].lowest, item[1].highest))
    names = ", ".join(f"'{name}' ({column})" for name, column in wide[:MAX_NAMED])
    return (
        f"its columns of wide range are {names}: take their logarithm or scale them to about 1 "
        "(ranking.scale_inputs does so by the training rows), or lower the learning rates"
    )
