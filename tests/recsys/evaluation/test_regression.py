"""Errors of labels that are numbers: against scikit-learn, with weights, and between runs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, mean_poisson_deviance, mean_squared_error

from recsys.config import MetricSettings
from recsys.evaluation.bootstrap import paired_difference, pooled_metric
from recsys.evaluation.further_metrics import make_metrics
from recsys.evaluation.metrics import ERRORS, evaluation_report
from recsys.evaluation.model_selection import selection_score
from recsys.evaluation.scores import SplitScores


def scores_of(loss: str, seed: int = 0, num_rows: int = 200) -> SplitScores:
    rng = np.random.default_rng(seed)
    labels = rng.poisson(2.0, (num_rows, 1)).astype(np.float32)
    return SplitScores(
        positions=np.arange(num_rows),
        groups=rng.integers(0, 20, num_rows),
        items=np.arange(num_rows),
        counts=rng.choice([0, 3, 8], num_rows),
        labels=labels,
        logits=rng.normal(size=(num_rows, 1)).astype(np.float32),
        label_names=("bought",),
        weights=rng.integers(1, 4, num_rows).astype(np.float32),
        losses=(loss,),
    )


def report_of(scores: SplitScores, **options: Any) -> dict[str, Any]:
    return evaluation_report(scores, **options)


@pytest.mark.parametrize("loss", ["mse", "huber", "poisson"])
def test_errors_equal_those_of_scikit_learn_in_each_part(loss: str) -> None:
    scores = scores_of(loss)
    report = report_of(scores)
    for subset, rows in {"warm": scores.counts >= 5, "unseen": scores.counts == 0}.items():
        label, logit = scores.labels[rows, 0], scores.logits[rows, 0].astype(np.float64)
        predicted = np.exp(logit) if loss == "poisson" else logit
        assert scores.weights is not None
        weights = {"sample_weight": scores.weights[rows]}
        rmse = mean_squared_error(label, predicted, **weights) ** 0.5
        assert report[subset]["rmse"] == pytest.approx(rmse)
        error = mean_absolute_error(label, predicted, **weights)
        assert report[subset]["mae"] == pytest.approx(error)
        mean = np.full(rows.sum(), np.average(label, weights=scores.weights[rows]))
        baseline_error = mean_squared_error(label, mean, **weights) ** 0.5
        assert report[subset]["nrmse"] == pytest.approx(rmse / baseline_error)
        if loss == "poisson":
            deviance = mean_poisson_deviance(label, predicted, **weights)
            assert report[subset]["deviance"] == pytest.approx(deviance)
    assert not report.keys() & {"auc", "gauc", "logloss"}


def test_integer_weights_are_repeated_rows_in_errors_and_their_intervals() -> None:
    scores, other = scores_of("mse"), scores_of("mse")
    other = replace(other, logits=other.logits + 0.5 * other.labels)
    assert scores.weights is not None
    rows = np.repeat(np.arange(len(scores.groups)), scores.weights.astype(int))
    pair = [replace(scores_of_run.take(rows), weights=None) for scores_of_run in (scores, other)]
    for metric in ERRORS:
        assert pooled_metric([scores], metric, "all") == pytest.approx(report_of(pair[0])[metric])
        assert report_of(scores)[metric] == pytest.approx(report_of(pair[0])[metric])
        actual = paired_difference([[scores]], [[other]], metric, "cold", samples=50)
        repeated_rows = paired_difference([[pair[0]]], [[pair[1]]], metric, "cold", samples=50)
        assert actual is not None and repeated_rows is not None
        assert vars(actual) == pytest.approx(vars(repeated_rows), abs=1e-9)
        expected = report_of(other)["cold"][metric] - report_of(scores)["cold"][metric]
        assert actual.value == pytest.approx(expected)


class MedianError:
    """Of numbers alone."""

    regression = True

    def __call__(
        self, labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, counts: np.ndarray
    ) -> float | None:
        return float(np.median(np.abs(labels - scores))) if len(labels) else None


def test_further_metrics_are_those_of_the_kind_of_label() -> None:
    settings = {
        "median": MetricSettings(f"{__name__}:MedianError"),
        "p2": MetricSettings("precision_at_k", {"k": 2}),
    }
    scores = scores_of("poisson")
    report = report_of(scores, extra_metrics=make_metrics(settings))
    error = np.abs(scores.labels[:, 0] - np.exp(scores.logits[:, 0].astype(np.float64)))
    assert report["median"] == pytest.approx(np.median(error)) and "p2" not in report


def test_the_lowest_error_is_best() -> None:
    scores = [selection_score({"rmse": rmse, "mae": 1.0}, "rmse") for rmse in (3.0, 0.5, 2.0)]
    assert scores.index(max(score for score in scores if score is not None)) == 1
    assert selection_score({"auc": 0.5}, "rmse") is None


def test_a_prediction_that_is_not_finite_is_refused() -> None:
    scores = scores_of("poisson")
    scores.logits[3] = 1e4
    with pytest.raises(ValueError, match=r"row 3.*inf"):
        report_of(scores)
