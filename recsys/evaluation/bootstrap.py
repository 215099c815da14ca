"""Tests by a bootstrap over users whether one model ranks better than another.

Rows of one user are not independent, so users are resampled, each with all rows. Both models
scored the same rows, so each resample is applied to both, which cancels the variance that easy and
hard users add to either metric. The interval is the one of the resampled differences. It covers
the choice of users, not of initial weights: for the latter, give runs of several seeds.
Percentile intervals of a cluster bootstrap: Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13; Field and Welsh, Bootstrapping Clustered Data, 2007. They are too
narrow if users are few or few of them differ much, and are then widened
(`recsys.evaluation.few_users`).

scipy.stats.bootstrap is not used: if a resample leaves a metric undefined (few users have cold
items), its interval is NaN, and it would sort the rows of every resample again. This module sorts
rows once, and a resample only counts how often each user was drawn.

Shapes: N rows of a window, U users of all windows, S resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recsys.evaluation.few_users import LEAST_USERS, effective_users, interval_ends
from recsys.evaluation.measures import Measure, defining_users, measure_of, rows_of_users
from recsys.evaluation.scores import SplitScores, check_same_rows

LARGEST = {"auc": 1.0, "gauc": 1.0, "rmse": np.inf, "mae": np.inf}  # differences
CELLS = 1 << 20  # elements of the largest matrices: resamples times rows or users


@dataclass(frozen=True)
class Interval:
    """A difference and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Return whether the interval excludes 0, so that the difference is significant."""
        return self.low > 0 or self.high < 0


def paired_difference(
    first: Sequence[Sequence[SplitScores]],
    second: Sequence[Sequence[SplitScores]],
    metric: str,
    part: str,
    samples: int = 2000,
    seed: int = 0,
    label: int = 0,
) -> Interval | None:
    """Return the difference of `second` from `first` in a metric, by a paired bootstrap of users.

    Args:
        first: runs of the first configuration: for each seed, the scores of each window (the test
            splits of a rolling split; one window for any other split). Seeds are averaged.
        second: runs of the second configuration, on the same windows; any number of seeds.
        metric: gauc or auc; rmse or mae of a label that is a number. AUC is the mean over windows,
            weighted by rows; the others are pooled, GAUC with users weighted by rows.
        part: all, warm, cold or unseen, as in `recsys.data.item_frequency`.
        samples: number of resamples. A user in several windows is drawn with the rows of all.
        seed: seed of the resamples, the same for all metrics and parts.
        label: index of the label.

    Returns:
        The difference and its interval; None where fewer than five users define the metric.

    Raises:
        ValueError: the runs scored different rows, or the metric or part is unknown.

    Example::

        rows, rng = np.arange(80), np.random.default_rng(0)
        labels = rng.integers(0, 2, (80, 1)).astype(np.float32)
        def scores(noise):
            logits = labels + noise * rng.normal(size=(80, 1)).astype(np.float32)
            return SplitScores(rows, rows // 4, rows, rows, labels, logits, ("liked",))
        difference = paired_difference([[scores(9.0)]], [[scores(0.1)]], "gauc", "all")
        difference.excludes_zero  # True
    """
    windows = _check_windows(first, second)
    users = np.unique(np.concatenate([window.groups for window in windows]))
    before, after = (
        _mean_measure([measure_of(run, users, metric, part, label) for run in side])
        for side in (first, second)
    )
    of_users = rows_of_users(windows, users, metric, part, label)
    if defining_users(of_users) < LEAST_USERS:
        return None
    cells = max(len(users), *(len(window.groups) for window in windows))
    draws = resamples(len(users), samples, max(1, CELLS // cells), np.random.default_rng(seed))
    return _interval(lambda drawn: after(drawn) - before(drawn), of_users, draws, LARGEST[metric])


def _mean_measure(measures: Sequence[Measure]) -> Measure:
    """Return the mean of measures of the same users."""
    return lambda drawn: np.mean([measure(drawn) for measure in measures], axis=0)


def _interval(
    measure: Measure,
    of_users: np.ndarray,  # [2, U]
    draws: Iterator[np.ndarray],
    limit: float,
) -> Interval | None:
    """Return the measure of all users and its interval; None if the measure is undefined.

    No end is beyond `limit`, the largest difference.
    """
    value = float(measure(np.ones((of_users.shape[1], 1)))[0])
    if np.isnan(value):
        return None
    drawn = np.concatenate([measure(counts) for counts in draws])
    deviations = drawn[~np.isnan(drawn)] - value
    low, high = interval_ends(deviations, min(map(effective_users, of_users)))
    return Interval(value, max(-limit, value + low), min(limit, value + high))


def pooled_metric(
    windows: Sequence[SplitScores], metric: str, part: str, label: int = 0
) -> float | None:
    """Compute the metric of a run, over its windows as in `paired_difference`; None if undefined.

    Raises:
        ValueError: the metric or part is unknown.
    """
    users = np.unique(np.concatenate([window.groups for window in windows]))
    value = float(measure_of(windows, users, metric, part, label)(np.ones((len(users), 1)))[0])
    return None if np.isnan(value) else value


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
    """Return the windows that all runs scored; raise ValueError if they differ."""
    if not first or not second or not first[0]:
        raise ValueError("first and second each need the scores of at least one run")
    windows = first[0]
    for side, runs in (("first", first), ("second", second)):
        for seed, run in enumerate(runs):
            where = f"seed {seed} of {side}"
            if len(run) != len(windows):
                raise ValueError(
                    f"{where} has {len(run)} windows, seed 0 of first {len(windows)}; "
                    "compare runs on the same windows"
                )
            for number, (expected, found) in enumerate(zip(windows, run, strict=True)):
                check_same_rows(expected, found, f"window {number}: seed 0 of first and {where}")
    return windows
