"""Computes ranking quality and calibration exactly, in float64.

AUC and GAUC count pairs in integers (`recsys.evaluation.auc`), so ties count exactly half at any
number of rows; the streaming metrics of torchmetrics bin or sum in float32, which is why they are
not used here. Rows of all ranks are gathered first: a mean of per-rank AUCs is not the AUC.
GAUC: Zhu et al., Optimized Cost per Click in Taobao Display Advertising, 2017. Normalised entropy:
He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, 2014.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from recsys.data.item_frequency import PARTS, frequency_masks
from recsys.evaluation.auc import sorted_auc
from recsys.evaluation.few_users import MARK_NOTE, marked
from recsys.evaluation.further_metrics import Metric, call_metric, fits_loss
from recsys.evaluation.regression import RegressionRows

ORDER_METRICS = ("auc", "gauc")  # of the order of scores alone
SHOWN = (*ORDER_METRICS, "logloss", "ne")  # metrics that tables show
SHOWN_OF_NUMBERS = ("rmse", "mae", "nrmse")  # of labels that are numbers


class RankedRows:
    """Rows sorted once, by score and by group and score, from which any part has its metrics.

    Args:
        labels: [N], 0 or 1.
        logits: [N], finite.
        groups: int [N], the user of each row.
        weights: [N], above 0; a weight of 2 is a row that is there twice. None: 1 each.

    Raises:
        ValueError: a label is not 0 or 1, or a logit is not finite.

    Example::

        labels, logits = np.array([1, 0, 1]), np.array([2.0, 0.5, 0.5])
        RankedRows(labels, logits, np.array([7, 7, 7])).metrics()["auc"]  # 0.75
    """

    def __init__(
        self,
        labels: np.ndarray,
        logits: np.ndarray,
        groups: np.ndarray,
        weights: np.ndarray | None = None,
    ) -> None:
        """Check the values, sort the rows and compute each row's loss and prediction."""
        label, logit, self.group = labels.astype(np.float64), logits.astype(np.float64), groups
        self.weight = None if weights is None else weights.astype(np.float64)
        assert label.ndim == 1 and label.shape == logit.shape == self.group.shape
        _check_values(label, logit)
        self.label, self.logit, self.positive = label, logit, label == 1
        self.by_score = np.argsort(logit)
        self.by_group = self.by_score[np.argsort(self.group[self.by_score], kind="stable")]
        self.scores = logit
        self.loss = np.logaddexp(0, logit) - label * logit
        self.prediction = np.exp(-np.logaddexp(0, -logit))

    def metrics(self, rows: np.ndarray | None = None) -> dict[str, Any]:  # rows: bool [N]
        """Compute the metrics of some rows, by default of all.

        Returns:
            auc: probability that a positive is above a negative; a tie counts half.
            gauc: AUC within each user, weighted by the user's rows; users with both labels only.
            logloss: mean binary cross-entropy.
            ne: normalised entropy, logloss over the entropy of the share of positives.
            calibration: mean prediction over share of positives.
            num_samples: number of rows.
            sum_of_weights: of the rows, if they are weighed.
            num_users: users with rows.
            gauc_users: users with both labels.
            A metric that the rows do not define (one class only, no rows) is None.
        """
        by_score, by_group = self.by_score, self.by_group
        if rows is not None:
            by_score, by_group = by_score[rows[by_score]], by_group[rows[by_group]]
        one_group = np.zeros(len(by_score), np.int64)
        weights = self._weights(by_score)
        _, auc, _ = sorted_auc(self.positive[by_score], self.logit[by_score], one_group, weights)
        of_groups = self.positive[by_group], self.logit[by_group], self.group[by_group]
        _, user_auc, user_rows = sorted_auc(*of_groups, self._weights(by_group))
        metrics: dict[str, Any] = {
            "auc": float(auc[0]) if len(auc) else None,
            "gauc": float(np.average(user_auc, weights=user_rows)) if len(user_auc) else None,
        }
        chosen = slice(None) if rows is None else rows
        columns = self.label[chosen], self.loss[chosen], self.prediction[chosen]
        users, weights = self.group[by_group], self._weights(chosen)
        counts: dict[str, Any] = {
            "num_samples": len(users),
            "num_users": int((users[1:] != users[:-1]).sum()) + (len(users) > 0),
            "gauc_users": len(user_auc),
        }
        if weights is not None:
            counts["sum_of_weights"] = float(weights.sum())
        return metrics | _probability_metrics(*columns, weights) | counts

    def _weights(self, rows: np.ndarray | slice) -> np.ndarray | None:
        return None if self.weight is None else self.weight[rows]


def rows_of_loss(
    labels: np.ndarray,
    logits: np.ndarray,
    groups: np.ndarray,
    weights: np.ndarray | None = None,
    loss: str = "bce",
) -> RankedRows | RegressionRows:
    """Return the rows [N] of a label with their metrics, by its loss."""
    if loss == "bce":
        return RankedRows(labels, logits, groups, weights)
    return RegressionRows(labels, logits, groups, weights, loss)


def evaluation_report(
    labels: np.ndarray,
    logits: np.ndarray,
    groups: np.ndarray,
    item_counts: np.ndarray,
    more: Mapping[str, Metric] | None = None,
    weights: np.ndarray | None = None,
    loss: str = "bce",
) -> dict[str, Any]:
    """Compute the metrics of all rows, and nested those of warm, cold and unseen items.

    They are those of `RankedRows`, or for a label that is a number of `RegressionRows`.

    Args:
        labels: [N], 0 or 1, or numbers.
        logits: [N], finite.
        groups: int [N], the user of each row.
        item_counts: int [N], training rows of the item of each row, see `frequency_masks`.
        more: further metrics by their names in the report, which do not weigh rows.
        weights: [N], above 0; None: 1 each.
        loss: of the label.

    Raises:
        ValueError: as `RankedRows` does, or one of `more` fails.
    """
    assert item_counts.shape == labels.shape
    ranked, reports = rows_of_loss(labels, logits, groups, weights, loss), {}
    columns = labels, ranked.scores, groups, item_counts
    more = {name: metric for name, metric in (more or {}).items() if fits_loss(metric, loss)}
    for part, rows in frequency_masks(item_counts).items():
        reports[part] = ranked.metrics(rows) | {
            name: call_metric(name, metric, *(column[rows] for column in columns))
            for name, metric in more.items()
        }
    return reports.pop("all") | reports


def format_report(
    report: dict[str, Any],
    more: Iterable[str] = (),
    names: Iterable[str] = SHOWN,
    title: str = "items",
) -> str:
    """Format a report with nested parts as a plain text table; undefined values are `-`.

    Args:
        report: such as an `evaluation_report`.
        more: names of further metrics in it.
        names: names of the metrics to show before them.
        title: header of the column of parts.
    """
    names = [*names, *more]
    rows = [(title, *names, "rows")]
    for part in PARTS:
        metrics = report if part == "all" else report[part]
        cells = (marked_cell(metrics, name) for name in names)
        rows.append((part, *cells, f"{metrics['num_samples']:,}"))
    least = [6, *(7 for _ in names), 10]
    widths = [max(width, *map(len, column)) for width, column in zip(least, zip(*rows))]
    lines = [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
        for first, *cells in rows
    ]
    has_mark = any(cell.startswith("(") for row in rows for cell in row)
    return "\n".join([*lines, MARK_NOTE] if has_mark else lines)


def marked_cell(metrics: Mapping[str, Any], name: str, undefined: str = "-") -> str:
    """Format a metric for a table; in parentheses if a handful of users define it."""
    users = metrics.get("gauc_users" if name == "gauc" else "num_users")
    return undefined if metrics[name] is None else marked(f"{metrics[name]:.4f}", users)


def _check_values(label: np.ndarray, logit: np.ndarray) -> None:  # label: [N], logit: [N]
    """Raise ValueError if a label is not 0 or 1, or a logit is not finite."""
    wrong = (label != 0) & (label != 1)
    if wrong.any():
        index = int(wrong.argmax())
        raise ValueError(f"label of row {index} is {label[index]}; a label must be 0 or 1")
    wrong = ~np.isfinite(logit)
    if wrong.any():
        index = int(wrong.argmax())
        raise ValueError(
            f"logit of row {index} is {logit[index]} ({wrong.sum()} of {len(logit)} rows are not "
            "finite): the model has diverged; lower the learning rates"
        )


def _probability_metrics(
    label: np.ndarray,  # [N]
    loss: np.ndarray,  # [N]
    prediction: np.ndarray,  # [N]
    weight: np.ndarray | None,  # [N]
) -> dict[str, float | None]:
    if len(label) == 0:
        return {"logloss": None, "ne": None, "calibration": None}
    logloss, share, predicted = (
        float(np.average(values, weights=weight)) for values in (loss, label, prediction)
    )
    if share == 0:
        return {"logloss": logloss, "ne": None, "calibration": None}
    calibration = predicted / share
    if label.all():  # a mean with weights may differ from 1 by rounding
        return {"logloss": logloss, "ne": None, "calibration": calibration}
    entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    return {"logloss": logloss, "ne": float(logloss / entropy), "calibration": calibration}
