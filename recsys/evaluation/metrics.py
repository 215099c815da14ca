"""Computes ranking quality and calibration exactly, in float64.

AUC and GAUC count pairs in integers, so ties count exactly half at any number of rows; the
streaming metrics of torchmetrics bin or sum in float32, which is why they are not used here. Rows
of all ranks are gathered first: a mean of per-rank AUCs is not the AUC.
GAUC: Zhu et al., Optimized Cost per Click in Taobao Display Advertising, 2017. Normalised entropy:
He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, 2014.

Shapes: N rows, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from recsys.data.item_parts import PARTS, item_parts
from recsys.evaluation.few_users import MARK_NOTE, marked
from recsys.evaluation.further_metrics import Metric, call_metric

if TYPE_CHECKING:
    from torch import Tensor

    Array = np.ndarray | Tensor
ORDER_METRICS = ("auc", "gauc")  # of the order of scores alone
SHOWN = (*ORDER_METRICS, "logloss", "ne")  # metrics that tables show


def ranking_metrics(labels: Array, logits: Array, groups: Array) -> dict[str, Any]:
    """Compute the metrics of N rows.

    Args:
        labels: [N], 0 or 1.
        logits: [N], finite.
        groups: int [N], the user of each row.

    Returns:
        auc: probability that a positive is above a negative; a tie counts half.
        gauc: AUC within each user, weighted by the user's rows; users with both labels only.
        logloss: mean binary cross-entropy.
        ne: normalised entropy, logloss over the entropy of the share of positives.
        calibration: mean prediction over share of positives.
        num_samples: N.
        num_users: users with rows.
        gauc_users: users with both labels.
        A metric that the rows do not define (one class only, no rows) is None.

    Raises:
        ValueError: a label is not 0 or 1, or a logit is not finite.

    Example::

        ranking_metrics(np.array([1, 0, 1]), np.array([2.0, 0.5, 0.5]), np.array([7, 7, 7]))["auc"]
        # 0.75
    """
    return RankedRows(labels, logits, groups).metrics()


class RankedRows:
    """Rows sorted once, by score and by group and score, from which any part has its metrics.

    Args:
        labels: [N], 0 or 1.
        logits: [N], finite.
        groups: int [N], the user of each row.

    Raises:
        ValueError: a label is not 0 or 1, or a logit is not finite.
    """

    def __init__(self, labels: Array, logits: Array, groups: Array) -> None:
        """Check the values, sort the rows and compute each row's loss and prediction."""
        label, logit = _numpy(labels).astype(np.float64), _numpy(logits).astype(np.float64)
        self.group = _numpy(groups)
        assert label.ndim == 1 and label.shape == logit.shape == self.group.shape
        _check_values(label, logit)
        self.label, self.logit, self.positive = label, logit, label == 1
        self.by_score = np.argsort(logit)
        self.by_group = self.by_score[np.argsort(self.group[self.by_score], kind="stable")]
        self.loss = np.logaddexp(0, logit) - label * logit
        self.prediction = np.exp(-np.logaddexp(0, -logit))

    def metrics(
        self,
        rows: np.ndarray | None = None,  # bool [N]
    ) -> dict[str, Any]:
        """Compute the metrics of `ranking_metrics` for some rows, by default for all."""
        by_score, by_group = self.by_score, self.by_group
        if rows is not None:
            by_score, by_group = by_score[rows[by_score]], by_group[rows[by_group]]
        one_group = np.zeros(len(by_score), np.int64)
        _, auc, _ = sorted_auc(self.positive[by_score], self.logit[by_score], one_group)
        of_groups = self.positive[by_group], self.logit[by_group], self.group[by_group]
        _, user_auc, user_rows = sorted_auc(*of_groups)
        metrics: dict[str, Any] = {
            "auc": float(auc[0]) if len(auc) else None,
            "gauc": float(np.average(user_auc, weights=user_rows)) if len(user_auc) else None,
        }
        chosen = slice(None) if rows is None else rows
        columns = self.label[chosen], self.loss[chosen], self.prediction[chosen]
        users = self.group[by_group]
        counts = {
            "num_samples": len(users),
            "num_users": int((users[1:] != users[:-1]).sum()) + (len(users) > 0),
            "gauc_users": len(user_auc),
        }
        return metrics | _probability_metrics(*columns) | counts


def evaluation_report(
    labels: Array,
    logits: Array,
    groups: Array,
    item_counts: Array,
    more: Mapping[str, Metric] | None = None,
) -> dict[str, Any]:
    """Compute `ranking_metrics` of all rows, and nested those of warm, cold and unseen items.

    Args:
        labels: [N], 0 or 1.
        logits: [N], finite.
        groups: int [N], the user of each row.
        item_counts: int [N], training rows of the item of each row, see `item_parts`.
        more: further metrics by their names in the report.

    Raises:
        ValueError: as `ranking_metrics` does, or one of `more` fails.
    """
    columns = [_numpy(values) for values in (labels, logits, groups, item_counts)]
    assert columns[3].shape == columns[0].shape
    ranked, reports = RankedRows(labels, logits, groups), {}
    for part, rows in item_parts(columns[3]).items():
        reports[part] = ranked.metrics(rows) | {
            name: call_metric(name, metric, *(column[rows] for column in columns))
            for name, metric in (more or {}).items()
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
    """Format a metric for a table; in parentheses if a handful of users define it.

    Args:
        metrics: those of a part, such as `ranking_metrics`.
        name: the metric.
        undefined: text for None.
    """
    users = metrics.get("gauc_users" if name == "gauc" else "num_users")
    return undefined if metrics[name] is None else marked(f"{metrics[name]:.4f}", users)


def _numpy(values: Array) -> np.ndarray:  # the same shape
    if isinstance(values, np.ndarray):
        return values
    values = values.detach().cpu()
    # numpy has no bfloat16
    return values.double().numpy() if values.is_floating_point() else values.numpy()


def _check_values(
    label: np.ndarray,  # [N]
    logit: np.ndarray,  # [N]
) -> None:
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


def grouped_auc(
    positive: np.ndarray,  # bool [N]
    score: np.ndarray,  # [N]
    group: np.ndarray,  # [N]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # [G], float64 [G], int64 [G]
    """Compute the AUC within each group that has both labels.

    Twice the number of pairs won, per positive, is 2 · (negatives below) + (negatives equal).

    Args:
        positive: whether the label of each row is 1.
        score: score of each row; higher ranks first.
        group: group of each row.

    Returns:
        The groups with both labels, ascending, and the AUC and the number of rows of each.
    """
    order = np.lexsort((score, group))
    return sorted_auc(positive[order], score[order], group[order])


def sorted_auc(
    positive: np.ndarray,  # bool [N]
    score: np.ndarray,  # [N]
    group: np.ndarray,  # [N]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # [G], float64 [G], int64 [G]
    """Compute `grouped_auc` of rows in the order of their groups, and in each of their scores."""
    if len(score) == 0:
        return group, np.zeros(0), np.zeros(0, dtype=np.int64)
    new_group = np.append(True, group[1:] != group[:-1])
    new_tie = np.append(True, score[1:] != score[:-1]) | new_group
    group_begin, tie_begin = np.flatnonzero(new_group), np.flatnonzero(new_tie)

    tie_positives = np.add.reduceat(positive, tie_begin, dtype=np.int64)
    tie_negatives = np.diff(np.append(tie_begin, len(score))) - tie_positives
    negatives_before = np.cumsum(tie_negatives) - tie_negatives
    first_tie = np.searchsorted(tie_begin, group_begin)
    ties_in_group = np.diff(np.append(first_tie, len(tie_begin)))
    negatives_below = negatives_before - np.repeat(negatives_before[first_tie], ties_in_group)
    wins = np.add.reduceat(tie_positives * (2 * negatives_below + tie_negatives), first_tie)

    rows = np.diff(np.append(group_begin, len(score)))
    positives = np.add.reduceat(tie_positives, first_tie)
    pairs = positives * (rows - positives)
    both = pairs > 0
    return group[group_begin][both], wins[both] / (2 * pairs[both]), rows[both]


def _probability_metrics(
    label: np.ndarray,  # [N]
    loss: np.ndarray,  # [N]
    prediction: np.ndarray,  # [N]
) -> dict[str, float | None]:
    if len(label) == 0:
        return {"logloss": None, "ne": None, "calibration": None}
    logloss = float(np.mean(loss))
    share = float(label.mean())
    if share == 0:
        return {"logloss": logloss, "ne": None, "calibration": None}
    calibration = float(np.mean(prediction)) / share
    if share == 1:
        return {"logloss": logloss, "ne": None, "calibration": calibration}
    entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    return {"logloss": logloss, "ne": float(logloss / entropy), "calibration": calibration}
