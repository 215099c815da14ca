"""Compute ranking quality, calibration and errors exactly, in float64.

GAUC: Zhu et al., Optimized Cost per Click in Taobao, 2017. Normalised entropy: He et al., Practical
Lessons from Predicting Clicks on Ads at Facebook, 2014. Shapes: N rows, G groups.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recsys.data.item_frequency import SUBSETS, frequency_masks
from recsys.evaluation.further_metrics import Metric, call_metric, fits_loss
from recsys.evaluation.scores import SplitScores

ORDER_METRICS = ("auc", "gauc")  # depend only on the order of scores
SHOWN = (*ORDER_METRICS, "logloss", "ne")  # metrics that tables show
SHOWN_OF_NUMBERS = ("rmse", "mae", "nrmse")  # metrics of numeric labels that tables show
ERRORS = ("rmse", "mae")  # lower is better
MIN_USERS = 5  # with fewer users, there is no interval and tables mark the metric
FEW_USERS_NOTE = f"Figures in parentheses rest on fewer than {MIN_USERS} users."


def grouped_auc(
    positive: np.ndarray,  # bool [N]
    score: np.ndarray,  # [N]
    group: np.ndarray,  # [N]
    weight: np.ndarray | None = None,  # float64 [N]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # [G], float64 [G], int64 or float64 [G]
    """Return groups with both labels, ascending, with the AUC and the rows' weight of each."""
    order = np.lexsort((score, group))
    sorted_weight = None if weight is None else weight[order]
    return _sorted_auc(positive[order], score[order], group[order], sorted_weight)


def _sorted_auc(
    positive: np.ndarray, score: np.ndarray, group: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute `grouped_auc` of rows sorted by group, and within a group by score."""
    if len(score) == 0:
        return group, np.zeros(0), np.zeros(0, dtype=np.int64)
    new_group = np.append(True, group[1:] != group[:-1])
    new_tie = np.append(True, score[1:] != score[:-1]) | new_group
    group_begin, tie_begin = np.flatnonzero(new_group), np.flatnonzero(new_tie)

    if weight is None:
        tie_positives = np.add.reduceat(positive, tie_begin, dtype=np.int64)
        tie_negatives = np.diff(np.append(tie_begin, len(score))) - tie_positives
    else:
        tie_positives, tie_negatives = (
            np.add.reduceat(np.where(mask, weight, 0.0), tie_begin)
            for mask in (positive, ~positive)
        )
    negatives_before = np.cumsum(tie_negatives) - tie_negatives
    first_tie = np.searchsorted(tie_begin, group_begin)
    ties_in_group = np.diff(np.append(first_tie, len(tie_begin)))
    negatives_below = negatives_before - np.repeat(negatives_before[first_tie], ties_in_group)
    wins = np.add.reduceat(tie_positives * (2 * negatives_below + tie_negatives), first_tie)

    positives, negatives = (
        np.add.reduceat(tie_counts, first_tie) for tie_counts in (tie_positives, tie_negatives)
    )
    pairs = positives * negatives
    defined, rows = pairs > 0, positives + negatives
    return group[group_begin][defined], wins[defined] / (2 * pairs[defined]), rows[defined]


def predicted(logits: np.ndarray, loss: str) -> np.ndarray:  # [N] -> float64 [N]
    """Return the predictions of a numeric label; the logits themselves with loss bce."""
    with np.errstate(over="ignore"):
        return np.exp(logits.astype(np.float64)) if loss == "poisson" else logits.astype(np.float64)


class ScoredRows:
    """Rows of a label, sorted once, so that metrics of any subset need no further sort.

    Labels [N] are 0 or 1 with loss bce, else numbers. Logits [N] are finite. Groups [N] are users.
    """

    def __init__(
        self,
        labels: np.ndarray,
        logits: np.ndarray,
        groups: np.ndarray,
        weights: np.ndarray | None = None,
        loss: str = "bce",
    ) -> None:
        self.group, self.loss, self.is_binary = groups, loss, loss == "bce"
        self.weight = None if weights is None else weights.astype(np.float64)
        self.label, self.scores = labels.astype(np.float64), predicted(logits, loss)
        label, score = self.label, self.scores
        wrong = (label != 0) & (label != 1)
        if self.is_binary and wrong.any():
            index = int(wrong.argmax())
            raise ValueError(f"label of row {index} is {label[index]}; a label must be 0 or 1")
        wrong = ~np.isfinite(score)
        if wrong.any():
            index, name = int(wrong.argmax()), "logit" if self.is_binary else "prediction"
            raise ValueError(
                f"{name} of row {index} is {score[index]} ({wrong.sum()} of {len(score)} rows are "
                "not finite): the model has diverged; lower the learning rates"
            )
        if self.is_binary:
            self.positive = label == 1
            self.by_score = np.argsort(score)
            self.by_group = self.by_score[np.argsort(groups[self.by_score], kind="stable")]
            self.cross_entropy = np.logaddexp(0, score) - label * score
            self.prediction = np.exp(-np.logaddexp(0, -score))

    def metrics(self, rows: np.ndarray | None = None) -> dict[str, Any]:  # rows: bool [N]
        """Compute the metrics of some rows, by default of all; an undefined metric is None.

        Returns:
            auc: probability that a positive is above a negative; a tie counts half.
            gauc: mean AUC of users with both labels, weighted by their rows.
            logloss, ne: mean binary cross-entropy; the same over the entropy of the mean label.
            calibration: mean prediction divided by mean label.
            rmse, mae, nrmse: errors of numeric labels; nrmse is rmse over that of the mean label.
            deviance: mean Poisson deviance.
        """
        rows = np.ones(len(self.label), bool) if rows is None else rows
        weights = None if self.weight is None else self.weight[rows]
        metrics = self._of_order(rows, weights) if self.is_binary else self._errors(rows, weights)
        return metrics if weights is None else metrics | {"sum_of_weights": float(weights.sum())}

    def _of_order(self, rows: np.ndarray, weights: np.ndarray | None) -> dict[str, Any]:
        by_score, by_group = (order[rows[order]] for order in (self.by_score, self.by_group))
        _, auc, _ = self._auc(by_score, np.zeros(len(by_score), np.int64))
        users = self.group[by_group]
        _, user_auc, user_rows = self._auc(by_group, users)
        return {
            "auc": float(auc[0]) if len(auc) else None,
            "gauc": float(np.average(user_auc, weights=user_rows)) if len(user_auc) else None,
            **self._probability_metrics(rows, weights),
            "num_samples": len(users),
            "num_users": int((users[1:] != users[:-1]).sum()) + (len(users) > 0),
            "gauc_users": len(user_auc),
        }

    def _auc(
        self, order: np.ndarray, groups: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        weights = None if self.weight is None else self.weight[order]
        return _sorted_auc(self.positive[order], self.scores[order], groups, weights)

    def _probability_metrics(
        self, rows: np.ndarray, weights: np.ndarray | None
    ) -> dict[str, float | None]:
        metrics: dict[str, float | None] = dict.fromkeys(("logloss", "ne", "calibration"))
        label = self.label[rows]
        if len(label) == 0:
            return metrics
        logloss, share, mean_prediction = (
            float(np.average(values, weights=weights))
            for values in (self.cross_entropy[rows], label, self.prediction[rows])
        )
        metrics["logloss"] = logloss
        if share > 0:
            metrics["calibration"] = mean_prediction / share
            if not label.all():  # a weighted mean of ones may differ from 1 by rounding
                entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))
                metrics["ne"] = float(logloss / entropy)
        return metrics

    def _errors(self, rows: np.ndarray, weights: np.ndarray | None) -> dict[str, Any]:
        label, value, users = self.label[rows], self.scores[rows], self.group[rows]
        names = ["rmse", "mae", "nrmse"]
        names += ["calibration", "deviance"] if self.loss == "poisson" else []
        errors: dict[str, Any] = dict.fromkeys(names)
        errors |= {"num_samples": len(label), "num_users": len(np.unique(users))}
        if len(label) == 0:
            return errors

        def mean(numbers: np.ndarray) -> float:
            return float(np.average(numbers, weights=weights))

        rmse, average = mean((value - label) ** 2) ** 0.5, mean(label)
        errors |= {"rmse": rmse, "mae": mean(np.abs(value - label))}
        deviation = mean((label - average) ** 2) ** 0.5
        errors["nrmse"] = rmse / deviation if np.ptp(label) else None
        if self.loss == "poisson":
            errors["calibration"] = mean(value) / average if average else None
            logs = [np.log(np.where(label > 0, numbers, 1.0)) for numbers in (label, value)]
            errors["deviance"] = 2 * mean(label * (logs[0] - logs[1]) - label + value)
        return errors


def evaluation_report(
    scores: SplitScores, label: int = 0, extra_metrics: Mapping[str, Metric] | None = None
) -> dict[str, Any]:
    """Compute a label's metrics of all rows, with nested metrics of warm, cold and unseen items.

    Unusable labels and logits are a ValueError.
    """
    rows, loss = scores.counted(label), scores.loss_of(label)
    labels, logits = rows.labels[:, label], rows.logits[:, label]
    scored, reports = ScoredRows(labels, logits, rows.groups, rows.weights, loss), {}
    columns = labels, scored.scores, rows.groups, rows.counts
    fitting = {n: metric for n, metric in (extra_metrics or {}).items() if fits_loss(metric, loss)}
    for subset, mask in frequency_masks(rows.counts).items():
        reports[subset] = scored.metrics(mask) | {
            name: call_metric(name, metric, *(column[mask] for column in columns))
            for name, metric in fitting.items()
        }
    return reports.pop("all") | reports


def format_report(
    report: dict[str, Any], names: Sequence[str] = SHOWN, title: str = "items"
) -> str:
    """Format the metrics `names` of a report as a text table; undefined values are `-`."""
    rows = [(title, *names, "rows")]
    for subset in SUBSETS:
        metrics = report if subset == "all" else report[subset]
        cells = (metric_cell(metrics, name) for name in names)
        rows.append((subset, *cells, f"{metrics['num_samples']:,}"))
    min_widths = [6, *(7 for _ in names), 10]
    widths = [max(width, *map(len, column)) for width, column in zip(min_widths, zip(*rows))]
    lines = [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
        for first, *cells in rows
    ]
    has_note = any(cell.startswith("(") for row in rows for cell in row)
    return "\n".join([*lines, FEW_USERS_NOTE] if has_note else lines)


def metric_cell(metrics: Mapping[str, Any], name: str, undefined: str = "-") -> str:
    """Format a metric for a table, in parentheses if fewer than `MIN_USERS` users define it."""
    users = metrics.get("gauc_users" if name == "gauc" else "num_users")
    return undefined if metrics[name] is None else in_parentheses(f"{metrics[name]:.4f}", users)


def in_parentheses(text: str, num_users: int | None) -> str:
    """Put a metric in parentheses if fewer than `MIN_USERS` users define it; a dash stays."""
    has_few_users = num_users is not None and num_users < MIN_USERS and text not in ("-", "–")
    return f"({text})" if has_few_users else text
