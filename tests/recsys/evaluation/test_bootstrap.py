"""The paired bootstrap over users, against literally duplicated rows and on planted differences."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

import recsys.evaluation.bootstrap
from recsys.data.item_frequency import PARTS, frequency_masks
from recsys.evaluation.bootstrap import (
    Interval,
    paired_difference,
    pooled_metric,
    resamples,
)
from recsys.evaluation.measures import metric_users
from recsys.evaluation.metrics import RankedRows, evaluation_report
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
    windows: Sequence[SplitScores], drawn: dict[int, int], metric: str, part: str, label: int
) -> float:
    """The metric where each user's rows are there as often as he was drawn, as users of new names.

    GAUC of all windows' rows together, a user of each window apart; AUC a mean weighted by rows.
    """
    tables = []
    for number, scores in enumerate(windows):
        masks = frequency_masks(scores.counts)
        labels, logits, names = [], [], []
        for user, times in drawn.items():
            rows = masks[part] & (scores.groups == user)
            for copy in range(times):
                labels.append(scores.labels[rows, label])
                logits.append(scores.logits[rows, label])
                names.append(np.full(rows.sum(), user * 100_000 + copy * 100 + number))
        tables.append([np.concatenate(parts) for parts in (labels, logits, names)])
    if metric == "gauc":
        together = [np.concatenate(parts) for parts in zip(*tables, strict=True)]
        return RankedRows(*together).metrics()["gauc"]
    found = [RankedRows(*table).metrics()["auc"] for table in tables]
    return np.average(found, weights=[len(table[0]) for table in tables])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("metric", METRICS)
def test_value_and_resamples_are_those_of_really_duplicated_rows(
    metric: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two windows that share users, two seeds against three, the second label."""
    windows = [random_scores(0, 160, 8), random_scores(1, 120, 8, first_user=4)]
    first = [[rescored(window, seed) for window in windows] for seed in (2, 3)]
    second = [[rescored(window, seed, 1.5) for window in windows] for seed in (4, 5, 6)]
    users = np.unique(np.concatenate([window.groups for window in windows]))

    def difference(counts: np.ndarray) -> float:
        drawn = dict(zip(users.tolist(), counts.astype(int).tolist(), strict=True))
        lower, higher = (
            np.mean([metric_of_duplicated_rows(run, drawn, metric, part, 1) for run in side])
            for side in (first, second)
        )
        return float(higher - lower)

    seen: list[np.ndarray] = []

    def ends(deviations: np.ndarray, users: float) -> tuple[float, float]:
        seen.append(deviations)
        return -users, 0.125

    monkeypatch.setattr(recsys.evaluation.bootstrap, "interval_ends", ends)
    found = paired_difference(first, second, metric, part, samples=40, seed=7, label=1)
    (drawn,) = resamples(len(users), 40, 40, np.random.default_rng(7))
    differences = np.array([difference(counts) for counts in drawn.T])
    value = difference(np.ones(len(users)))
    assert found is not None and found.value == pytest.approx(value, abs=1e-12)
    np.testing.assert_allclose(seen, [differences - value], atol=1e-12)
    assert (found.low, found.high) == (-1, found.value + 0.125)  # a difference is at least -1


def test_every_user_is_drawn_with_replacement_and_as_many_as_there_are() -> None:
    counts = np.concatenate(list(resamples(50, 1000, 300, np.random.default_rng(0))), axis=1)
    assert counts.shape == (50, 1000)
    assert (counts.sum(axis=0) == 50).all()
    np.testing.assert_allclose(counts.mean(axis=1), 1, atol=0.15)
    assert counts.var() == pytest.approx(1 - 1 / 50, abs=0.02)  # binomial, of 50 draws in 50


def test_memory_is_bounded_by_blocks_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = random_scores(0, 100, 9)
    pairs = [[scores]], [[rescored(scores, 1)]]
    whole = [paired_difference(*pairs, metric, "all", samples=50) for metric in METRICS]
    monkeypatch.setattr(
        recsys.evaluation.bootstrap, "CELLS", 700
    )  # seven resamples of a hundred rows
    assert [paired_difference(*pairs, metric, "all", samples=50) for metric in METRICS] == whole


@pytest.mark.parametrize("metric", METRICS)
def test_the_pooled_metric_of_one_window_is_that_of_the_report(metric: str) -> None:
    scores = random_scores(0, 200, 12)
    report = evaluation_report(
        scores.labels[:, 0], scores.logits[:, 0], scores.groups, scores.counts
    )
    for part in PARTS:
        expected = report[metric] if part == "all" else report[part][metric]
        assert pooled_metric([scores], metric, part) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_runs_that_score_alike_differ_by_nothing(metric: str) -> None:
    scores = random_scores(0, 100, 9)
    found = paired_difference([[scores]], [[scores]], metric, "all")
    assert found == Interval(0, 0, 0)
    assert not found.excludes_zero


@pytest.mark.parametrize("metric", METRICS)
def test_a_planted_difference_is_found_in_either_direction(metric: str) -> None:
    scores = random_scores(0, 2000, 100)
    weak, strong = rescored(scores, 1, signal=0.5), rescored(scores, 2, signal=1.5)
    better = paired_difference([[weak]], [[strong]], metric, "all")
    worse = paired_difference([[strong]], [[weak]], metric, "all")
    assert better is not None and worse is not None
    assert 0 < better.low < better.value < better.high and better.excludes_zero
    assert worse.high < 0 and worse.excludes_zero


def alike(seed: int, num_users: int, spread: float) -> tuple[SplitScores, SplitScores]:
    """Scores of two models of one quality, each better for some users.

    A user has about 20 rows, or, with a `spread`, numbers of rows that differ widely.
    """
    rng = np.random.default_rng(seed)
    rows = np.exp(np.log(20) + spread * rng.normal(size=num_users)).astype(int).clip(2)
    users = np.repeat(np.arange(num_users), rows)
    labels = rng.integers(0, 2, (len(users), 1)).astype(np.float32)
    signals = 1 + rng.normal(size=(2, num_users))
    logits = [labels * of[users, None] + rng.normal(size=labels.shape) for of in signals]
    rows = np.arange(len(users))
    first, second = (
        SplitScores(rows, users, rows, np.full(len(rows), 9), labels, logit, ("liked",))
        for logit in logits
    )
    return first, second


@pytest.mark.parametrize("spread", [0, 1])
@pytest.mark.parametrize("num_users", [5, 10])
@pytest.mark.parametrize("metric", METRICS)
def test_models_that_are_alike_are_told_apart_in_at_most_one_of_twenty_data_sets(
    metric: str, num_users: int, spread: float
) -> None:
    """Percentiles alone tell models apart in 17 % of the sets of 5 users, 11 % of those of 10."""
    apart = 0
    for seed in range(300):
        first, second = alike(seed, num_users, spread)
        found = paired_difference([[first]], [[second]], metric, "all", samples=200)
        apart += found is not None and found.excludes_zero
    assert apart <= 26  # 15 expected at most, with a standard deviation of 4


def test_a_large_difference_is_seen_with_ten_users() -> None:
    scores = random_scores(0, 400, 10)
    found = paired_difference(
        [[rescored(scores, 1, 0.2)]], [[rescored(scores, 2, 2.5)]], "gauc", "all"
    )
    assert found is not None and found.excludes_zero


def test_the_interval_is_that_of_users_not_of_rows() -> None:
    """Ten copies of each row say nothing new of the users."""
    scores = random_scores(0, 100, 20)
    other = rescored(scores, 1)
    often = np.repeat(np.arange(100), 10)
    names = ("positions", "groups", "items", "counts", "labels", "logits")
    repeated = [
        replace(s, **{name: getattr(s, name)[often] for name in names}) for s in (scores, other)
    ]
    once = paired_difference([[scores]], [[other]], "gauc", "all")
    tenfold = paired_difference([[repeated[0]]], [[repeated[1]]], "gauc", "all")
    assert once is not None and tenfold is not None
    assert (tenfold.value, tenfold.low, tenfold.high) == pytest.approx(
        (once.value, once.low, once.high), abs=1e-12
    )


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
    assert [metric_users([scores], metric, part) for part in PARTS] == [9, 4, 5, 0]
    assert pooled_metric([scores], metric, "warm") == 0.5
    assert paired_difference(*pair, metric, "unseen") is None
    assert pooled_metric([scores], metric, "unseen") is None


def test_runs_on_other_rows_or_windows_are_refused() -> None:
    scores = random_scores(0, 30, 4)
    moved = replace(scores, groups=scores.groups + 1)
    with pytest.raises(ValueError, match=r"window 1: .* seed 1 of second: groups .* 30 of"):
        paired_difference([[scores] * 2], [[scores] * 2, [scores, moved]], "auc", "all")
    with pytest.raises(ValueError, match=r"seed 0 of second .* 1 .*first 2"):
        paired_difference([[scores] * 2], [[scores]], "auc", "all")
    with pytest.raises(ValueError, match="one run"):
        paired_difference([], [[scores]], "auc", "all")
    with pytest.raises(ValueError, match="metric 'ndcg' "):
        paired_difference([[scores]], [[scores]], "ndcg", "all")
    with pytest.raises(ValueError, match="part 'hot' "):
        paired_difference([[scores]], [[scores]], "auc", "hot")
