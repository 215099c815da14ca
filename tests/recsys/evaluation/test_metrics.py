"""Metrics equal their definitions, built in ones and further ones."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from recsys.cli import main
from recsys.config import BestModelBy, MetricSettings, ranking_settings
from recsys.distributed.gather import gather_rows, gather_rows_to_first
from recsys.evaluation.evaluate import format_evaluation
from recsys.evaluation.further_metrics import PrecisionAtK, make_metrics
from recsys.evaluation.metrics import SHOWN, ScoredRows, evaluation_report, format_report
from recsys.evaluation.model_selection import (
    selection_score,
    selection_text,
    warn_of_undefined,
)
from recsys.evaluation.scores import SplitScores
from recsys.storage.location import Location
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import page_code, train_argv


def random_rows(
    num_rows: int, num_users: int, num_scores: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, logits with about `num_scores` values (so, many ties), and users."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, num_scores, num_rows) / num_scores * 6 - 3
    labels = (rng.random(num_rows) < 1 / (1 + np.exp(-logits / 2))).astype(np.float32)
    return labels, logits, rng.integers(0, num_users, num_rows)


def scores_of(
    labels: np.ndarray, logits: np.ndarray, groups: np.ndarray, counts: np.ndarray
) -> SplitScores:
    rows = np.arange(len(labels))
    return SplitScores(rows, groups, rows, counts, labels[:, None], logits[:, None], ("liked",))


def brute_force_gauc(labels: np.ndarray, logits: np.ndarray, groups: np.ndarray) -> float:
    total, weight = 0.0, 0
    for user in np.unique(groups):
        rows = groups == user
        if 0 < labels[rows].sum() < rows.sum():
            total += rows.sum() * roc_auc_score(labels[rows], logits[rows])
            weight += rows.sum()
    return total / weight


@pytest.mark.parametrize("num_scores", [1, 3, 100, 10**9])
def test_auc_and_gauc_equal_scikit_learn_and_a_loop_over_users(num_scores: int) -> None:
    labels, logits, groups = random_rows(3000, 400, num_scores)
    metrics = ScoredRows(labels, logits, groups).metrics()
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
    assert metrics["gauc"] == pytest.approx(brute_force_gauc(labels, logits, groups), abs=1e-12)


def test_log_loss_entropy_and_calibration_equal_their_definitions() -> None:
    labels, logits, groups = random_rows(5000, 10, 10**9)
    predictions = 1 / (1 + np.exp(-logits))
    share = labels.mean(dtype=np.float64)
    metrics = ScoredRows(labels, logits, groups).metrics()
    assert metrics["logloss"] == pytest.approx(log_loss(labels, predictions), abs=1e-12)
    base = log_loss(labels, np.full(len(labels), share))
    assert metrics["ne"] == pytest.approx(metrics["logloss"] / base, abs=1e-12)
    assert metrics["calibration"] == pytest.approx(predictions.mean() / share, abs=1e-12)
    assert metrics["num_samples"] == 5000


def test_huge_logits_give_finite_losses() -> None:
    metrics = ScoredRows(np.array([1, 0]), np.array([-1e4, 1e4]), np.zeros(2, int)).metrics()
    assert metrics["logloss"] == 1e4


@pytest.mark.parametrize(
    ("labels", "undefined"),
    [
        ([1, 1, 1, 1], {"auc", "gauc", "ne"}),
        ([0, 0, 0, 0], {"auc", "gauc", "ne", "calibration"}),
        ([1, 1, 0, 0], {"gauc"}),  # no user has both labels
        ([], {"auc", "gauc", "logloss", "ne", "calibration"}),
    ],
)
def test_what_the_rows_do_not_define_is_none_and_writes_as_null(
    labels: list[int], undefined: set[str]
) -> None:
    users = np.array([3, 3, 5, 5])[: len(labels)]
    logits = np.array([0.5, -1, 2, 0])[: len(labels)]
    metrics = ScoredRows(np.array(labels), logits, users).metrics()
    assert {name for name, value in metrics.items() if value is None} == undefined
    json.dumps(metrics, allow_nan=False)


def test_a_label_that_is_neither_zero_nor_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row 1 is 0\.5"):
        ScoredRows(np.array([1, 0.5]), np.zeros(2), np.zeros(2, int)).metrics()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"row 2 is (nan|inf) "):
        ScoredRows(np.array([1, 0, 1]), np.array([0, 0, value]), np.zeros(3, int)).metrics()


def test_a_report_holds_the_metrics_of_warm_cold_and_unseen_items() -> None:
    labels, logits, groups = random_rows(2000, 30, 50)
    counts = np.random.default_rng(1).integers(0, 12, 2000)
    report = evaluation_report(scores_of(labels, logits, groups, counts))
    subsets = {"warm": counts >= 5, "cold": counts < 5, "unseen": counts == 0}
    for name, rows in subsets.items():
        assert report.pop(name) == ScoredRows(labels[rows], logits[rows], groups[rows]).metrics()
    assert report == ScoredRows(labels, logits, groups).metrics()


def test_the_table_shows_each_part_and_a_dash_for_what_is_not_defined() -> None:
    """And parentheses around what fewer than five users define."""
    labels, logits = np.array([1, 0, 1]), np.array([1.0, 0.0, 0.5])
    scores = scores_of(labels, logits, np.zeros(3, int), np.array([9, 9, 0]))
    report = evaluation_report(scores)
    assert (report["num_users"], report["gauc_users"], report["unseen"]["gauc_users"]) == (1, 1, 0)
    lines = [line.split() for line in format_report(report).splitlines()]
    assert lines[0] == ["items", "auc", "gauc", "logloss", "ne", "rows"]
    assert lines[1][:3] == ["all", "(1.0000)", "(1.0000)"]
    assert [line[0] for line in lines[1:5]] == ["all", "warm", "cold", "unseen"]
    assert lines[4] == ["unseen", "-", "-", "(0.4741)", "-", "1"]  # log(1 + exp(-0.5))


def gather_share(
    rank: int, world_size: int, rows: list[Tensor], cut: int
) -> tuple[list[Tensor], list[Tensor]]:
    share = slice(0, cut) if rank == 0 else slice(cut, None)
    shares = [tensor[share] for tensor in rows]
    to_all = [gather_rows(share, dist.group.WORLD) for share in shares]
    return to_all, [gather_rows_to_first(share, dist.group.WORLD) for share in shares]


@pytest.mark.parametrize("cut", [0, 700])
def test_metrics_of_rows_split_unevenly_over_two_ranks_equal_those_of_all_rows(cut: int) -> None:
    labels, logits, groups = random_rows(1000, 40, 30)
    rows = [
        torch.tensor(labels),
        torch.tensor(logits, dtype=torch.bfloat16),
        torch.tensor(groups),
        torch.tensor(labels) == 1,
        torch.tensor(logits, dtype=torch.float32).view(-1, 1).repeat(1, 3),
    ]
    (_, first), (_, second) = gathered_rows = run_on_ranks(gather_share, 2, rows, cut)
    assert [len(tensor) for tensor in second] == [0] * 5
    for gathered in (first, *(to_all for to_all, _ in gathered_rows)):
        for full, tensor in zip(rows, gathered, strict=True):
            assert full.dtype == tensor.dtype
            assert torch.equal(full, tensor)


def gather_unlike_rows(rank: int, world_size: int) -> Any:
    with pytest.raises(ValueError, match=r"\[2, 3\]|\(2, 3\)") as caught:
        gather_rows(torch.zeros(2, 3) if rank == 0 else torch.zeros(2, 4))
    return str(caught.value)


def test_rows_of_unlike_width_are_refused_on_every_rank() -> None:
    messages = run_on_ranks(gather_unlike_rows, 2)
    assert messages[0] == messages[1]
    assert "(2, 3)" in messages[0] and "(2, 4)" in messages[0]


@pytest.mark.parametrize(("loss", "is_shown"), [("pointwise", True), ("in_batch_softmax", False)])
def test_scores_of_a_softmax_loss_are_no_probabilities_to_judge(loss: str, is_shown: bool) -> None:
    values = {"auc": 0.5, "gauc": None, "logloss": 2.5, "ne": 1.5, "num_samples": 7}
    report = values | dict.fromkeys(("warm", "cold", "unseen"), values)
    table = format_evaluation(report, ranking_settings("two_tower", loss=loss))
    assert "auc" in table
    assert ("logloss" in table) == ("2.5" in table) == ("1.5" in table) == is_shown


REPORT = {
    "auc": 0.75,
    "gauc": 0.5,
    "unseen": {"auc": 0.25, "gauc": 1.0},
    "retrieval": {"recall@10": 0.25, "ndcg@10": 0.125},
}


@pytest.mark.parametrize(
    ("metric", "score", "message"),
    [
        ("auc", 0.75, "AUC"),
        ("gauc", 0.5, "GAUC"),
        ("auc_and_gauc", 0.625, "mean of AUC and GAUC"),
        ("all_and_unseen", 0.625, "mean of AUC and GAUC, of all rows and of unseen items"),
        ("recall", 0.25, "RECALL@10"),
        ("ndcg", 0.125, "NDCG@10"),
    ],
)
def test_a_model_is_chosen_by_the_mean_of_the_metrics_named(
    metric: BestModelBy, score: float, message: str
) -> None:
    assert selection_score(REPORT, metric) == score
    assert selection_text(metric) == message


def test_auc_alone_stands_for_the_mean_where_gauc_is_not_defined() -> None:
    assert selection_score({"auc": 0.5, "gauc": None}, "auc_and_gauc") == 0.5


def test_metrics_of_unseen_items_count_where_they_are_defined() -> None:
    undefined = {"auc": 0.5, "gauc": 1.0, "unseen": {"auc": None, "gauc": None}}
    assert selection_score(undefined, "all_and_unseen") == 0.75
    one_label_each = {**undefined, "unseen": {"auc": 0.0, "gauc": None}}
    assert selection_score(one_label_each, "all_and_unseen") == 0.5
    tracked = {"auc": 0.5, "gauc": 1.0, "auc_unseen": 0.0}
    assert selection_score(tracked, "all_and_unseen") == 0.5


@pytest.mark.parametrize("auc", [None, 0.5])
def test_a_validation_without_unseen_items_is_warned_of(
    auc: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    report = {"auc": 0.5, "gauc": 1.0, "unseen": {"auc": auc, "gauc": None}}
    warn_of_undefined(Location.of("shop"), report, "auc_and_gauc")
    assert not caplog.messages
    warn_of_undefined(Location.of("shop"), report, "all_and_unseen")
    assert ["shop/valid: AUC of unseen" in text for text in caplog.messages] == [True] * (
        auc is None
    )


def test_a_metric_that_is_not_defined_chooses_nothing() -> None:
    assert selection_score({"auc": 0.5, "gauc": None}, "gauc") is None
    assert selection_score({"auc": None, "gauc": None}, "auc_and_gauc") is None
    assert selection_score({}, "recall") is None


def precision(k: int, rows: list[tuple[int, int, float]]) -> float | None:
    """Precision@K of rows (user, label, score)."""
    users, labels, scores = (np.array(column) for column in zip(*rows))
    return PrecisionAtK(k)(labels.astype(float), scores, users, np.zeros(len(rows), np.int64))


@pytest.mark.parametrize(
    ("k", "rows", "expected"),
    [
        # The mean over users, in whatever order their rows come.
        (1, [(1, 0, 1.0), (2, 1, 5.0), (1, 1, 0.0), (2, 0, 4.0)], 1 / 2),
        # Fewer rows than K: all of them are judged.
        (10, [(1, 1, 2.0), (1, 0, 1.0), (1, 0, 0.0)], 1 / 3),
        # One place is taken, two rows tie for the other: (1 + 1 / 2) / 2.
        (2, [(1, 1, 3.0), (1, 1, 2.0), (1, 0, 2.0), (1, 1, 1.0)], 3 / 4),
        # No positive at all.
        (1, [(1, 0, 2.0), (2, 0, 1.0)], None),
    ],
)
def test_precision_at_k_by_hand(
    k: int, rows: list[tuple[int, int, float]], expected: float | None
) -> None:
    assert precision(k, rows) == pytest.approx(expected)


def test_a_report_has_each_metric_of_all_rows_and_of_each_part() -> None:
    extra = make_metrics({"p1": MetricSettings("precision_at_k", {"k": 1})})
    labels, scores = np.array([1.0, 0.0, 0.0, 1.0]), np.array([3.0, 2.0, 1.0, 0.0])
    rows = scores_of(labels, scores, np.zeros(4, int), np.array([9, 9, 0, 0]))
    report = evaluation_report(rows, extra_metrics=extra)
    assert report["p1"] == 1 and report["warm"]["p1"] == 1
    assert report["cold"]["p1"] == 0 and report["unseen"]["p1"] == 0
    head, everything, *_ = format_report(report, [*SHOWN, *extra]).splitlines()
    assert head.split()[-2:] == ["p1", "rows"] and everything.split()[-2:] == ["(1.0000)", "4"]


@pytest.mark.parametrize("name", ["gauc", "auc_unseen", "rows", "partition"])
def test_a_metric_has_no_name_of_a_line_of_results(name: str) -> None:
    with pytest.raises(ValueError, match=rf"metrics\.{name}: every report has"):
        make_metrics({name: MetricSettings("precision_at_k")})


@pytest.mark.parametrize("name", ["", "a/b", "a?"])  # MLflow makes one of a? and a!
def test_a_metric_has_a_name_that_all_trackers_tell_apart(name: str) -> None:
    with pytest.raises(ValueError, match=rf"metrics\.{re.escape(name)}: trackers take names of"):
        make_metrics({name: MetricSettings("precision_at_k")})


def test_a_metric_of_ones_own_is_one_file_and_one_line_of_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_metrics.py").write_text(page_code("recsys/evaluation/README.md", "ShareAbove"))
    monkeypatch.syspath_prepend(tmp_path)
    data = write_dataset(tmp_path / "data", {"train": 33, "valid": 20, "test": 20})
    argv = train_argv(data, tmp_path / "run", "--content", "none", "--epochs", "1")
    recipe = Path(argv[argv.index("--config") + 1]).read_text()
    line = "metrics: {mine: {metric: 'my_metrics:ShareAbove', options: {bound: 0.0}}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe + line)
    argv[argv.index("--config") + 1] = str(tmp_path / "recipe.yaml")

    assert main(argv) == 0

    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for report in (metrics["valid"], metrics["test"], metrics["test"]["cold"]):
        assert 0 <= report["mine"] <= 1
    assert "mine        rows" in capsys.readouterr().out
