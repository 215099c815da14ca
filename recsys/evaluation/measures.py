"""Metrics of resampled users, AUC, GAUC and errors, by how often each user was drawn.

Shapes: N rows of a window, U users of all windows, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from recsys.data.item_frequency import PARTS, frequency_masks
from recsys.evaluation.auc import RankedPairs, grouped_auc, ratio
from recsys.evaluation.regression import ERRORS, predicted
from recsys.evaluation.scores import SplitScores

METRICS = ("auc", "gauc")  # of labels of 0 and 1


def metrics_of(loss: str) -> tuple[str, ...]:
    """Return the metrics that are compared for a label with this loss."""
    return METRICS if loss == "bce" else ERRORS


# How often each user was drawn, float64 [U, S] -> the metric in each resample, NaN where the rows
# drawn do not define it, float64 [S].
Measure = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _Rows:
    """Rows of a window that count for a label and a part of the items."""

    label: np.ndarray  # [N]
    logit: np.ndarray  # [N]
    user: np.ndarray  # int64 [N], index in U
    weight: np.ndarray | None  # [N]; None: 1 each
    loss: str  # of the label

    @property
    def positive(self) -> np.ndarray:  # bool [N]
        """Mask of the labels that are 1."""
        return self.label == 1


def _rows_of(
    windows: Sequence[SplitScores],
    users: np.ndarray,  # [U], users of all windows, ascending
    part: str,
    label: int,
) -> list[_Rows]:
    """Return the rows of each window that count."""
    if part not in PARTS:
        raise ValueError(f"part '{part}' is none of {PARTS}")
    found = []
    for window in windows:
        scores = window.counted(label)
        rows = frequency_masks(scores.counts)[part]
        found.append(
            _Rows(
                scores.labels[rows, label],
                scores.logits[rows, label],
                np.searchsorted(users, scores.groups[rows]),
                None if scores.weights is None else scores.weights[rows].astype(np.float64),
                scores.loss_of(label),
            )
        )
    return found


def measure_of(
    windows: Sequence[SplitScores],
    users: np.ndarray,  # [U], users of all windows, ascending
    metric: str,
    part: str,
    label: int,
) -> Measure:
    """Return the metric of one run as a function of how often each user is drawn.

    Raises:
        ValueError: the metric or part is unknown.
    """
    if metric not in (known := metrics_of(windows[0].loss_of(label))):
        raise ValueError(f"metric '{metric}' is none of {known}")
    of_windows = _rows_of(windows, users, part, label)
    if metric in ERRORS:
        return _error(of_windows, len(users), metric)
    if metric == "gauc":
        return _grouped(of_windows, len(users))
    return _mean_over_windows(
        [RankedPairs.of(of.positive, of.logit, of.user, of.weight) for of in of_windows]
    )


def metric_users(windows: Sequence[SplitScores], metric: str, part: str, label: int = 0) -> int:
    """Count the users that define a metric, in any window.

    For GAUC these are users with both labels; for AUC, which compares positives with negatives,
    users with a positive or users with a negative, whichever are fewer; for errors, all.
    """
    users = np.unique(np.concatenate([window.groups for window in windows]))
    return defining_users(rows_of_users(windows, users, metric, part, label))


def defining_users(of_users: np.ndarray) -> int:  # of_users: [2, U]
    """Return the least number of users with rows, of `rows_of_users`."""
    return int((of_users > 0).sum(axis=1).min())


def rows_of_users(
    windows: Sequence[SplitScores],
    users: np.ndarray,  # [U], ascending
    metric: str,
    part: str,
    label: int,
) -> np.ndarray:  # float64 [2, U]
    """Sum each user's positive and negative rows; for GAUC and errors, twice all counted rows."""
    found = np.zeros((2, len(users)))
    for of in _rows_of(windows, users, part, label):
        if metric == "gauc":
            both, _, of_user = grouped_auc(of.positive, of.user, of.user, of.weight)
            found[:, both] += of_user
        elif metric in ERRORS:
            found += np.bincount(of.user, of.weight, minlength=len(users))
        else:
            for kind, chosen in enumerate((of.positive, ~of.positive)):
                weights = None if of.weight is None else of.weight[chosen]
                found[kind] += np.bincount(of.user[chosen], weights, minlength=len(users))
    return found


def _grouped(windows: Sequence[_Rows], num_users: int) -> Measure:
    """Return GAUC as a measure: both its sums are linear in how often each user was drawn."""
    gains, rows = np.zeros(num_users), np.zeros(num_users)
    for of in windows:
        found, auc, of_user = grouped_auc(of.positive, of.logit, of.user, of.weight)
        gains[found] += of_user * auc
        rows[found] += of_user

    def measure(drawn: np.ndarray) -> np.ndarray:  # [U, S] -> [S]
        return ratio(gains @ drawn, rows @ drawn)

    return measure


def _error(windows: Sequence[_Rows], num_users: int, metric: str) -> Measure:
    """Return RMSE or MAE as a measure, pooled over windows."""
    errors, rows = np.zeros(num_users), np.zeros(num_users)
    power = 2 if metric == "rmse" else 1
    for of in windows:
        weight = np.ones(len(of.label)) if of.weight is None else of.weight
        error = np.abs(predicted(of.logit, of.loss) - of.label) ** power
        errors += np.bincount(of.user, error * weight, minlength=num_users)
        rows += np.bincount(of.user, weight, minlength=num_users)

    def measure(drawn: np.ndarray) -> np.ndarray:  # [U, S] -> [S]
        return ratio(errors @ drawn, rows @ drawn) ** (1 / power)

    return measure


def _mean_over_windows(windows: Sequence[RankedPairs]) -> Measure:
    """Return AUC as a measure: the mean over windows that define it, weighted by rows."""

    def measure(drawn: np.ndarray) -> np.ndarray:  # [U, S] -> [S]
        total, rows = np.zeros(drawn.shape[1]), np.zeros(drawn.shape[1])
        for window in windows:
            auc, of_window = window.auc(drawn)
            defined = ~np.isnan(auc)
            total[defined] += (auc * of_window)[defined]
            rows[defined] += of_window[defined]
        return ratio(total, rows)

    return measure
