"""Test by a paired bootstrap over users whether one model ranks better than another.

Percentile intervals of a cluster bootstrap: Efron and Tibshirani 1993, chapter 13; Field and Welsh
2007. Intervals of few users are widened, as they exclude 0 too often (17 % for 5 users, not 5 %):
Hesterberg, American Statistician 69, 2015; Kish 1965; Hall, JRSS B 54, 1992.
Shapes: N rows of a window, U users, S resamples; P positive and M negative rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from recsys.data.item_frequency import SUBSETS, frequency_masks
from recsys.evaluation.metrics import ERRORS, MIN_USERS, grouped_auc, predicted
from recsys.evaluation.scores import SplitScores, check_same_rows

UPPER = (1 + 0.95) / 2  # quantile at the upper end of the intervals
PERCENTILES = (2.5, 97.5)


def effective_users(weights: np.ndarray) -> float:  # weights: [U]
    """Return Kish's effective sample size: the number of equal weights of the same variance."""
    weights = weights.astype(np.float64)
    return float(weights.sum() ** 2 / (weights**2).sum())


def interval_stretch(users: float) -> float:
    """Return the factor that widens a percentile interval, for effective users: 1.58 for 5."""
    from scipy.special import ndtri, stdtrit

    users = max(users, 2.0)
    return float(stdtrit(users - 1, UPPER) / ndtri(UPPER) * np.sqrt(users / (users - 1)))


def interval_ends(deviations: np.ndarray, users: float) -> tuple[float, float]:  # deviations: [S]
    """Return the ends of a 95 % interval around a value, relative to it: the lower is negative.

    `deviations` are the metric in each resample of users minus the metric of all users.
    """
    from scipy.special import stdtrit

    users = max(users, 2.0)
    lower, upper = np.percentile(deviations, PERCENTILES) * interval_stretch(users)
    quantile = float(stdtrit(users - 1, UPPER))
    error = deviations.std() * np.sqrt(users / (users - 1))
    skewness = _skewness(deviations, users)
    below, above = (
        error * max(quantile, _unskewed(quantile, signed)) for signed in (skewness, -skewness)
    )
    return float(min(lower, -below)), float(max(upper, above))


def _skewness(deviations: np.ndarray, users: float) -> float:
    """Return the skewness of the resamples, shrunk by the variance that chance explains."""
    centred = deviations - deviations.mean()
    variance = (centred**2).mean()
    if variance == 0:
        return 0.0
    skewness = (centred**3).mean() / variance**1.5
    chance_variance = 6 / users**2 + 6 / len(deviations)  # for normal users and resamples
    return float(skewness**3 / (skewness**2 + chance_variance))


def _unskewed(quantile: float, skewness: float) -> float:
    """Return the inverse of Hall's transformation at the quantile, up to its flat point."""
    if abs(skewness) < 1e-6:
        return quantile
    root = np.cbrt(max(0.0, 1 + skewness * (quantile - skewness / 6)))
    return float(3 / skewness * (root - 1))


METRICS = ("auc", "gauc")  # for labels of 0 and 1
LARGEST = {"auc": 1.0, "gauc": 1.0, "rmse": np.inf, "mae": np.inf}  # largest possible difference
CELLS = 1 << 20  # largest number of elements of a matrix of resamples times rows or users

# How often each user is drawn, float64 [U, S] -> the metric, NaN if undefined, float64 [S].
Measure = Callable[[np.ndarray], np.ndarray]
WindowAUC = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # -> AUC and weight of rows


@dataclass(frozen=True)
class Interval:
    """A difference and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def metrics_of(loss: str) -> tuple[str, ...]:
    """Return the metrics that are compared for a label with this loss."""
    return METRICS if loss == "bce" else ERRORS


def paired_difference(
    first: Sequence[Sequence[SplitScores]],
    second: Sequence[Sequence[SplitScores]],
    metric: str,
    subset: str,
    samples: int = 2000,
    seed: int = 0,
    label: int = 0,
) -> Interval | None:
    """Return the difference of `second` from `first` in a metric, by a paired bootstrap of users.

    `first` and `second` hold scores by seed and window; metrics are averaged over seeds. `metric`
    is gauc, auc, rmse or mae; `subset` is all, warm, cold or unseen. A resample draws users, each
    with the rows of all windows. None if too few users define it; a ValueError if rows differ.
    """
    windows = _check_windows(first, second)
    users = _all_users(windows)
    measures = [
        [_measure(run, users, metric, subset, label) for run in runs] for runs in (first, second)
    ]

    def difference(drawn: np.ndarray) -> np.ndarray:  # [U, S] -> [S]
        first_value, second_value = (
            np.mean([measure(drawn) for measure, _ in runs], axis=0) for runs in measures
        )
        return np.asarray(second_value - first_value)

    _, user_rows = measures[0][0]
    if _defining_users(user_rows) < MIN_USERS:
        return None
    value = float(difference(np.ones((len(users), 1)))[0])
    if np.isnan(value):
        return None
    cells = max(len(users), *(len(window.groups) for window in windows))
    draws = resamples(len(users), samples, max(1, CELLS // cells), np.random.default_rng(seed))
    differences = np.concatenate([difference(drawn) for drawn in draws])
    deviations = differences[~np.isnan(differences)] - value
    lower, upper = interval_ends(deviations, min(map(effective_users, user_rows)))
    limit = LARGEST[metric]
    return Interval(value, max(-limit, value + lower), min(limit, value + upper))


def pooled_metric(windows: Sequence[SplitScores], metric: str, subset: str) -> float | None:
    """Compute the metric of a run as `paired_difference` does; None if undefined."""
    users = _all_users(windows)
    measure, _ = _measure(windows, users, metric, subset)
    value = float(measure(np.ones((len(users), 1)))[0])
    return None if np.isnan(value) else value


def metric_users(windows: Sequence[SplitScores], metric: str, subset: str) -> int:
    """Count the users that define a metric, in any window; for AUC, users of the rarer label."""
    _, user_rows = _measure(windows, _all_users(windows), metric, subset)
    return _defining_users(user_rows)


def resamples(
    num_users: int, samples: int, block: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield how often each user is drawn in U draws with replacement; float64 [U, <= `block`]."""
    for start in range(0, samples, block):
        size = min(block, samples - start)
        drawn = rng.integers(num_users, size=(size, num_users))
        drawn += num_users * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * num_users)
        yield np.ascontiguousarray(counts.reshape(size, num_users).T, dtype=np.float64)


def _check_windows(
    first: Sequence[Sequence[SplitScores]], second: Sequence[Sequence[SplitScores]]
) -> Sequence[SplitScores]:
    if not first or not second or not first[0]:
        raise ValueError("first and second each need the scores of at least one run")
    windows = first[0]
    for name, runs in (("first", first), ("second", second)):
        for seed, run in enumerate(runs):
            where = f"seed {seed} of {name}"
            if len(run) != len(windows):
                raise ValueError(
                    f"{where} has {len(run)} windows, seed 0 of first {len(windows)}; "
                    "compare runs on the same windows"
                )
            for number, (expected, window) in enumerate(zip(windows, run, strict=True)):
                check_same_rows(expected, window, f"window {number}: seed 0 of first and {where}")
    return windows


def _all_users(windows: Sequence[SplitScores]) -> np.ndarray:  # [U], ascending
    return np.unique(np.concatenate([window.groups for window in windows]))


@dataclass(frozen=True)
class _Rows:
    """Rows of a window that count for a label and belong to one part of the items."""

    label: np.ndarray  # [N]
    logit: np.ndarray  # [N]
    user: np.ndarray  # int64 [N], index in U
    weight: np.ndarray | None  # [N]; None: 1 each
    loss: str  # of the label

    @property
    def positive(self) -> np.ndarray:  # bool [N]
        return self.label == 1


def _counted_rows(window: SplitScores, users: np.ndarray, subset: str, label: int) -> _Rows:
    if subset not in SUBSETS:
        raise ValueError(f"part '{subset}' is none of {SUBSETS}")
    scores = window.counted(label)
    rows = frequency_masks(scores.counts)[subset]
    return _Rows(
        label=scores.labels[rows, label],
        logit=scores.logits[rows, label],
        user=np.searchsorted(users, scores.groups[rows]),
        weight=None if scores.weights is None else scores.weights[rows].astype(np.float64),
        loss=scores.loss_of(label),
    )


def _defining_users(user_rows: np.ndarray) -> int:  # user_rows: [2, U]
    return int((user_rows > 0).sum(axis=1).min())


def _measure(
    windows: Sequence[SplitScores], users: np.ndarray, metric: str, subset: str, label: int = 0
) -> tuple[Measure, np.ndarray]:  # float64 [2, U]
    """Return a function from draws of users to a run's metric, and the weight of each user's rows.

    The weights are of positive and of negative rows; for GAUC and errors both are of all rows.
    """
    counted = [_counted_rows(window, users, subset, label) for window in windows]
    if metric not in (metrics := metrics_of(counted[0].loss)):
        raise ValueError(f"metric '{metric}' is none of {metrics}")
    user_rows = np.zeros((2, len(users)))
    if metric == "auc":
        for rows in counted:
            for index, mask in enumerate((rows.positive, ~rows.positive)):
                weights = None if rows.weight is None else rows.weight[mask]
                user_rows[index] += np.bincount(rows.user[mask], weights, minlength=len(users))
        aucs = [_ranked_pairs(rows) for rows in counted]
        return partial(_mean_auc, aucs), user_rows
    # GAUC and errors are ratios of two sums that are linear in the draws of each user.
    power = 2 if metric == "rmse" else 1
    numerator = np.zeros(len(users))
    for rows in counted:
        if metric == "gauc":
            defined, auc, weights = grouped_auc(rows.positive, rows.logit, rows.user, rows.weight)
            numerator[defined] += weights * auc
            user_rows[:, defined] += weights
        else:
            error = np.abs(predicted(rows.logit, rows.loss) - rows.label) ** power
            weight = np.ones(len(error)) if rows.weight is None else rows.weight
            numerator += np.bincount(rows.user, error * weight, minlength=len(users))
            user_rows += np.bincount(rows.user, rows.weight, minlength=len(users))

    def measure(drawn: np.ndarray) -> np.ndarray:  # [U, S] -> [S]
        return ratio(numerator @ drawn, user_rows[0] @ drawn) ** (1 / power)

    return measure, user_rows


def _mean_auc(aucs: Sequence[WindowAUC], drawn: np.ndarray) -> np.ndarray:  # [U, S] -> [S]
    """Return the mean AUC over the windows in which it is defined, weighted by rows."""
    total, rows = np.zeros(drawn.shape[1]), np.zeros(drawn.shape[1])
    for auc_of_window in aucs:
        auc, window_rows = auc_of_window(drawn)
        defined = ~np.isnan(auc)
        total[defined] += (auc * window_rows)[defined]
        rows[defined] += window_rows[defined]
    return ratio(total, rows)


def _ranked_pairs(rows: _Rows) -> WindowAUC:
    """Rank a window's rows once; return a function from draws [U, S] to AUC [S] and weight [S].

    AUC is NaN without a pair of positive and negative rows, and a tie counts half.
    """
    positive, logit = rows.positive, rows.logit
    order = np.argsort(logit[~positive], kind="stable")
    ranked = logit[~positive][order]
    positive_users, negative_users = rows.user[positive], rows.user[~positive][order]  # [P], [M]
    # [P] each: how many negatives have a lower logit, and how many have no higher one.
    below = np.searchsorted(ranked, logit[positive], side="left")
    not_above = np.searchsorted(ranked, logit[positive], side="right")
    weights = None  # [P, 1], [M, 1]
    if rows.weight is not None:
        weights = rows.weight[positive][:, None], rows.weight[~positive][order][:, None]

    def auc(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positives, drawn_negatives = drawn[positive_users], drawn[negative_users]
        if weights is not None:
            positives *= weights[0]
            drawn_negatives *= weights[1]
        negatives = np.zeros((len(negative_users) + 1, drawn.shape[1]))
        np.cumsum(drawn_negatives, axis=0, out=negatives[1:])
        twice_won = negatives[below]
        twice_won += negatives[not_above]
        wins = np.einsum("ps,ps->s", positives, twice_won) / 2
        num_positives, num_negatives = positives.sum(axis=0), negatives[-1]
        return ratio(wins, num_positives * num_negatives), num_positives + num_negatives

    return auc


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:  # [S], [S] -> [S]
    """Return the ratio, NaN where the denominator is 0."""
    undefined = np.full(len(numerator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)
