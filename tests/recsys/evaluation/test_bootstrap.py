"""The paired bootstrap over users, against literally duplicated rows and on planted differences."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

import recsys.evaluation.bootstrap
from recsys.data.item_frequency import SUBSETS, frequency_masks
from recsys.evaluation.bootstrap import (
    Interval,
    effective_users,
    interval_ends,
    interval_stretch,
    metric_users,
    paired_difference,
    pooled_metric,
    resamples,
)
from recsys.evaluation.metrics import ScoredRows
from recsys.evaluation.scores import SplitScores

METRICS = ["auc", "gauc"]


def random_scores(seed: int, num_rows: int, num_users: int, first_user: int = 0) -> SplitScores:
    """Rows with ties, items of all parts and users of few rows; two labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (num_rows, 2)).astype(np.float32)
    return SplitScores(
        positions=np.arange(num_rows),
        groups=10 * rng.integers(first_user, first_user + num_users, num_rows),
        items=np.arange(num_rows),
        counts=rng.choice([0, 3, 8], num_rows),
        labels=labels,
        logits=np.round(labels + rng.normal(size=labels.shape)).astype(np.float32),
        label_names=("liked", "bought"),
    )


def rescored(scores: SplitScores, seed: int, signal: float = 1.0) -> SplitScores:
    """The same rows with logits of another model."""
    noise = np.random.default_rng(seed).normal(size=scores.labels.shape)
    logits = np.round(signal * scores.labels + noise, 1).astype(np.float32)
    return replace(scores, logits=logits)


def metric_of_duplicated_rows(
    windows: Sequence[SplitScores], drawn: dict[int, int], metric: str, subset: str, label: int
) -> float:
    """The metric where each user's rows are there as often as he was drawn, as users of new names.

    GAUC of all windows' rows together, a user of each window apart; AUC a mean weighted by rows.
    """
    tables = []
    for number, scores in enumerate(windows):
        masks = frequency_masks(scores.counts)
        labels, logits, names = [], [], []
        for user, times in drawn.items():
            rows = masks[subset] & (scores.groups == user)
            for copy in range(times):
                labels.append(scores.labels[rows, label])
                logits.append(scores.logits[rows, label])
                names.append(np.full(rows.sum(), user * 100_000 + copy * 100 + number))
        tables.append([np.concatenate(arrays) for arrays in (labels, logits, names)])
    if metric == "gauc":
        together = [np.concatenate(arrays) for arrays in zip(*tables, strict=True)]
        return ScoredRows(*together).metrics()["gauc"]
    actual = [ScoredRows(*table).metrics()["auc"] for table in tables]
    return np.average(actual, weights=[len(table[0]) for table in tables])


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("metric", METRICS)
def test_value_and_resamples_are_those_of_really_duplicated_rows(
    metric: str, subset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two windows that share users, two seeds against three, the second label."""
    windows = [random_scores(0, 160, 8), random_scores(1, 120, 8, first_user=4)]
    first = [[rescored(window, seed) for window in windows] for seed in (2, 3)]
    second = [[rescored(window, seed, 1.5) for window in windows] for seed in (4, 5, 6)]
    users = np.unique(np.concatenate([window.groups for window in windows]))

    def difference(counts: np.ndarray) -> float:
        drawn = dict(zip(users.tolist(), counts.astype(int).tolist(), strict=True))
        lower, higher = (
            np.mean([metric_of_duplicated_rows(run, drawn, metric, subset, 1) for run in side])
            for side in (first, second)
        )
        return float(higher - lower)

    recorded: list[np.ndarray] = []

    def ends(deviations: np.ndarray, users: float) -> tuple[float, float]:
        recorded.append(deviations)
        return -users, 0.125

    monkeypatch.setattr(recsys.evaluation.bootstrap, "interval_ends", ends)
    actual = paired_difference(first, second, metric, subset, samples=40, seed=7, label=1)
    (drawn,) = resamples(len(users), 40, 40, np.random.default_rng(7))
    differences = np.array([difference(counts) for counts in drawn.T])
    value = difference(np.ones(len(users)))
    assert actual is not None and actual.value == pytest.approx(value, abs=1e-12)
    np.testing.assert_allclose(recorded, [differences - value], atol=1e-12)
    assert (actual.low, actual.high) == (-1, actual.value + 0.125)  # a difference is at least -1


def test_every_user_is_drawn_with_replacement_and_as_many_as_there_are() -> None:
    counts = np.concatenate(list(resamples(50, 1000, 300, np.random.default_rng(0))), axis=1)
    assert counts.shape == (50, 1000)
    assert (counts.sum(axis=0) == 50).all()
    np.testing.assert_allclose(counts.mean(axis=1), 1, atol=0.15)
    assert counts.var() == pytest.approx(1 - 1 / 50, abs=0.02)  # binomial, of 50 draws in 50


def test_memory_is_bounded_by_blocks_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = random_scores(0, 100, 9)
    pairs = [[scores]], [[rescored(scores, 1)]]
    expected = [paired_difference(*pairs, metric, "all", samples=50) for metric in METRICS]
    monkeypatch.setattr(
        recsys.evaluation.bootstrap, "CELLS", 700
    )  # seven resamples of a hundred rows
    assert [paired_difference(*pairs, metric, "all", samples=50) for metric in METRICS] == expected


@pytest.mark.parametrize("metric", METRICS)
def test_a_planted_difference_is_found_in_either_direction(metric: str) -> None:
    scores = random_scores(0, 2000, 100)
    weak, strong = rescored(scores, 1, signal=0.5), rescored(scores, 2, signal=1.5)
    better = paired_difference([[weak]], [[strong]], metric, "all")
    worse = paired_difference([[strong]], [[weak]], metric, "all")
    assert better is not None and worse is not None
    assert 0 < better.low < better.value < better.high and better.excludes_zero
    assert worse.high < 0 and worse.excludes_zero


@pytest.mark.parametrize("metric", METRICS)
def test_what_fewer_than_five_users_define_has_no_interval(metric: str) -> None:
    """Of ten users four have rows of warm items, five of cold ones; one more has no positive."""
    users = np.repeat([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 4)
    warm = (users < 5) | (users == 10)
    labels = np.where(users < 10, np.arange(40) % 2, 0).astype(np.float32)[:, None]
    scores = replace(
        random_scores(0, 40, 1),
        groups=users,
        counts=np.where(warm, 9, 2),
        labels=labels,
        logits=np.zeros((40, 1), np.float32),
    )
    pair = [[scores]], [[scores]]
    assert paired_difference(*pair, metric, "all") == Interval(0, 0, 0)
    assert paired_difference(*pair, metric, "cold") is not None
    assert paired_difference(*pair, metric, "warm") is None
    assert [metric_users([scores], metric, subset) for subset in SUBSETS] == [9, 4, 5, 0]
    assert pooled_metric([scores], metric, "warm") == 0.5
    assert paired_difference(*pair, metric, "unseen") is None
    assert pooled_metric([scores], metric, "unseen") is None


SETS = 2000
# Differences of users, of mean 0 and variance 1.
DISTRIBUTIONS = {
    "normal": lambda random, shape: random.normal(size=shape),
    "heavy tails": lambda random, shape: random.standard_t(3, size=shape) / np.sqrt(3),
    "skewed": lambda random, shape: random.exponential(size=shape) - 1,
}


def test_users_of_unlike_weight_count_as_fewer() -> None:
    assert effective_users(np.array([10, 0, 0, 10])) == 2
    assert interval_stretch(300) < 1.01 < 1.05 < interval_stretch(30) < 1.1
    assert interval_stretch(5) == pytest.approx(2.7764 / 1.96 * 1.118, 1e-3)


def test_without_skewness_the_interval_is_that_of_student_and_percentiles() -> None:
    deviations = stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
    lower, upper = interval_ends(deviations, 10)
    assert upper == pytest.approx(-lower) == pytest.approx(2.262 * np.sqrt(10 / 9), rel=0.01)
    assert interval_ends(np.zeros(50), 10) == (0, 0)
    bounded = np.repeat([-1.0, 1.0], 1000)  # percentiles are within, Student's is beyond
    assert interval_ends(bounded, 1000)[1] == pytest.approx(1.963, abs=1e-2)


def test_a_skewed_mean_has_the_longer_side_of_hall_s_transformation() -> None:
    deviations = stats.gamma(a=36).ppf((np.arange(4000) + 0.5) / 4000) - 36  # skewness 1 / 3
    skewness = stats.skew(deviations)
    skewness *= skewness**2 / (skewness**2 + 6 / 20**2 + 6 / 4000)
    quantile = stats.t(19).ppf(0.975)

    def transformed(t: float) -> float:
        return t + skewness * t**2 / 3 + skewness**2 * t**3 / 27 + skewness / 6

    lower, upper = interval_ends(deviations, 20)
    error = deviations.std() * np.sqrt(20 / 19)
    assert transformed(-upper / error) == pytest.approx(-quantile)
    assert lower == pytest.approx(-quantile * error)
    assert interval_ends(-deviations, 20) == pytest.approx((-upper, -lower))
    # Where the transformation is flat its end is no farther than that of the percentiles.
    deviations = stats.expon.ppf((np.arange(4000) + 0.5) / 4000) - 1
    percentile = np.percentile(deviations, 97.5)
    assert interval_ends(deviations, 20)[1] == pytest.approx(percentile * interval_stretch(20))


def share_excluding_zero(name: str, num_users: int) -> float:
    """The share of sets of users whose interval excludes 0."""
    random = np.random.default_rng(num_users)
    differences = DISTRIBUTIONS[name](random, (num_users, SETS))
    counts = random.multinomial(num_users, np.full(num_users, 1 / num_users), size=500)
    means = differences.mean(axis=0)
    resampled = counts @ differences / num_users - means  # [S, SETS]
    ends = np.array([interval_ends(deviations, num_users) for deviations in resampled.T])
    return float(((means + ends[:, 0] > 0) | (means + ends[:, 1] < 0)).mean())


@pytest.mark.parametrize("num_users", [10, 20, 50])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_users_without_a_difference_show_one_in_about_one_of_twenty_sets(
    name: str, num_users: int
) -> None:
    """Without correction of skewness one shows in 8.2 % of the skewed sets of 10 users."""
    assert 0.02 < share_excluding_zero(name, num_users) < 0.068  # 0.005 is a standard deviation
