"""Scores of a split's rows: the file beside a run, and that runs are compared on the same rows."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from recsys.cli import main
from recsys.evaluation.metrics import evaluation_report
from recsys.evaluation.scores import SplitScores, check_same_rows, read_scores, write_scores
from tests.recsys.command_runs import NUM_ROWS, TrainedRun, assert_same_metrics

TWO_LABELS = SplitScores(
    positions=np.array([0, 1, 4]),
    groups=np.array([7, -3, 7]),
    items=np.array([2, 2, 9]),
    counts=np.array([5, 5, 0]),
    labels=np.array([[1, 0], [0, 0], [1, 1]], np.float32),
    logits=np.array([[0.5, -1], [0.25, 2], [-3, 0]], np.float32),
    label_names=("clicked", "bought"),
)
FIELDS = ("positions", "groups", "items", "counts", "labels", "logits")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_scores(TWO_LABELS, tmp_path / "scores.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]
    columns = pq.read_schema(tmp_path / "scores.parquet").names
    assert columns[:4] == ["row", "group", "item", "training_impressions"]
    assert columns[4:] == ["label_clicked", "logit_clicked", "label_bought", "logit_bought"]
    read = read_scores(tmp_path / "scores.parquet")
    assert read.label_names == TWO_LABELS.label_names
    for name in FIELDS:
        expected, actual = getattr(TWO_LABELS, name), getattr(read, name)
        np.testing.assert_array_equal(actual, expected)
        assert actual.dtype == expected.dtype


def test_a_run_on_two_ranks_leaves_the_test_rows_in_their_order(trained: TrainedRun) -> None:
    scores = read_scores(trained.run / "scores_test.parquet")
    impressions = pq.read_table(trained.data / "test")
    np.testing.assert_array_equal(scores.positions, np.arange(NUM_ROWS["test"]))
    np.testing.assert_array_equal(scores.groups, impressions["user"].to_numpy())
    np.testing.assert_array_equal(scores.items, impressions["item"].to_numpy())
    np.testing.assert_array_equal(scores.labels[:, 0], impressions["liked"].to_numpy())
    assert scores.label_names == ("liked",)
    train_items = pq.read_table(trained.data / "train")["item"].to_numpy()
    np.testing.assert_array_equal(
        scores.counts, np.bincount(train_items, minlength=30)[scores.items]
    )


@pytest.mark.parametrize("split", ["test", "valid"])
def test_metrics_of_a_run_are_those_of_its_scores(trained: TrainedRun, split: str) -> None:
    if split == "valid":
        assert main(["evaluate", "--run", str(trained.run), "--split", split]) == 0
    scores = read_scores(trained.run / f"scores_{split}.parquet")
    report = evaluation_report(
        scores.labels[:, 0], scores.logits[:, 0], scores.groups, scores.counts
    )
    metrics = json.loads((trained.run / "metrics.json").read_text())
    assert_same_metrics(report, metrics[split])


def test_a_file_that_is_no_scores_is_named(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    with pytest.raises(ValueError, match=f"{path}: "):
        read_scores(path)
    write_scores(TWO_LABELS, path)
    pq.write_table(pq.read_table(path).drop_columns(["logit_bought"]), path)
    with pytest.raises(ValueError, match=f"{path}: column 'logit_bought' is missing"):
        read_scores(path)


@pytest.mark.parametrize("name", ["positions", "groups", "labels", "counts"])
def test_rows_that_differ_are_told_by_column_and_row(name: str) -> None:
    values = getattr(TWO_LABELS, name).copy()
    values[2] = 8
    other = replace(TWO_LABELS, **{name: values})
    with pytest.raises(ValueError, match=f"{name} differ .*1 of 3 .*row 2"):
        check_same_rows(TWO_LABELS, other, "a and b")


def test_another_number_of_rows_is_told_and_logits_may_differ() -> None:
    check_same_rows(TWO_LABELS, replace(TWO_LABELS, logits=-TWO_LABELS.logits), "a and b")
    fewer = replace(TWO_LABELS, **{name: getattr(TWO_LABELS, name)[:2] for name in FIELDS})
    with pytest.raises(ValueError, match=r"positions .*\(3,\) .*\(2,\)"):
        check_same_rows(TWO_LABELS, fewer, "a and b")
