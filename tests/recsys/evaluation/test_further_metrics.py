"""Metrics by name: precision@K by hand-computed values, and one of a user's own in a file."""

import json
from pathlib import Path

import numpy as np
import pytest

from recsys.cli import main
from recsys.config import MetricSettings
from recsys.evaluation.further_metrics import PrecisionAtK, make_metrics
from recsys.evaluation.metrics import evaluation_report, format_report
from tests.datasets import write_dataset
from tests.recsys.command_runs import train_words


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
    report = evaluation_report(labels, scores, np.zeros(4, int), np.array([9, 9, 0, 0]), extra)
    assert report["p1"] == 1 and report["warm"]["p1"] == 1
    assert report["cold"]["p1"] == 0 and report["unseen"]["p1"] == 0
    head, everything, *_ = format_report(report, extra).splitlines()
    assert head.split()[-2:] == ["p1", "rows"] and everything.split()[-2:] == ["(1.0000)", "4"]


OWN_METRIC = '''
class ShareAbove:
    """The share of rows with a score above a bound."""

    def __init__(self, bound):
        self.bound = bound

    def __call__(self, labels, scores, groups, counts):
        return float((scores > self.bound).mean()) if len(scores) else None
'''


def test_a_metric_of_ones_own_is_one_file_and_one_line_of_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_metrics.py").write_text(OWN_METRIC)
    monkeypatch.syspath_prepend(tmp_path)
    data = write_dataset(tmp_path / "data", {"train": 33, "valid": 20, "test": 20})
    words = train_words(data, tmp_path / "run", "--content", "none", "--epochs", "1")
    recipe = Path(words[words.index("--config") + 1]).read_text()
    line = "metrics: {mine: {metric: 'my_metrics:ShareAbove', options: {bound: 0.0}}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe + line)
    words[words.index("--config") + 1] = str(tmp_path / "recipe.yaml")

    assert main(words) == 0

    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for report in (metrics["valid"], metrics["test"], metrics["test"]["cold"]):
        assert 0 <= report["mine"] <= 1
    assert "mine        rows" in capsys.readouterr().out
