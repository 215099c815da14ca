"""Stored scores, and ties in them."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from recsys.cli import main
from recsys.evaluation import further_metrics
from recsys.evaluation.bootstrap import pooled_metric
from recsys.evaluation.metrics import evaluation_report
from recsys.evaluation.retrieval import count_above, retrieval_metrics
from recsys.evaluation.scores import SplitScores, check_same_rows, read_scores, write_scores
from tests.recsys.command_runs import NUM_ROWS, TrainedRun, assert_same_metrics

ROWS = 6  # 720 orders
ORDERS = np.array(list(permutations(range(ROWS))))  # int [720, 6], each row's place among ties
DEPTHS = (1, 2, 4)
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]  # labels, scores and users [N]


def random_rows(seed: int) -> Columns:
    rng = np.random.default_rng(seed)
    labels, scores = rng.integers(0, 2, ROWS), rng.integers(0, rng.integers(1, 4), ROWS)
    return labels.astype(float), scores.astype(float), rng.integers(0, 2, ROWS)


def strict_auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    wins = [above > below for above in scores[labels == 1] for below in scores[labels == 0]]
    return float(np.mean(wins)) if wins else None


def strict_gauc(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float | None:
    by_user = [
        (strict_auc(labels[users == u], scores[users == u]), sum(users == u)) for u in (0, 1)
    ]
    defined = [(auc, rows) for auc, rows in by_user if auc is not None]
    return (
        sum(auc * rows for auc, rows in defined) / sum(rows for _, rows in defined)
        if defined
        else None
    )


def strict_precision(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float | None:
    by_user = [(labels[users == u], -scores[users == u]) for u in (0, 1)]
    best = [label[np.argsort(lowest)][:2].mean() for label, lowest in by_user if label.sum()]
    return float(np.mean(best)) if best else None


# Of a further metric: its options, and the metric of scores without ties.
METRICS: dict[str, tuple[dict[str, Any], Callable[..., float | None]]] = {
    "precision_at_k": ({"k": 2}, strict_precision)
}


def over_orders(metric: Callable[[np.ndarray], float | None], scores: np.ndarray) -> float | None:
    """Mean of a metric of strictly ordered scores over all orders that break the ties."""
    actual = [metric(scores + order / 10) for order in ORDERS]
    return (
        None
        if actual[0] is None
        else float(np.mean([value for value in actual if value is not None]))
    )


@pytest.mark.parametrize("seed", range(8))
def test_auc_gauc_and_further_metrics_are_their_means_over_random_tie_breaks(seed: int) -> None:
    labels, scores, users = random_rows(seed)
    assert set(METRICS) == set(further_metrics.METRICS)
    extra = {
        name: further_metrics.PrecisionAtK(**options) for name, (options, _) in METRICS.items()
    }
    counts = np.full(ROWS, 9)
    rows = np.arange(ROWS)
    columns = labels[:, None].astype(np.float32), scores[:, None].astype(np.float32)
    pooled = SplitScores(rows, users, rows, counts, *columns, ("liked",))
    report = evaluation_report(pooled, extra_metrics=extra)
    expected = {
        "auc": over_orders(lambda strict: strict_auc(labels, strict), scores),
        "gauc": over_orders(lambda strict: strict_gauc(labels, strict, users), scores),
        **{
            name: over_orders(partial(metric, labels, users=users), scores)
            for name, (_, metric) in METRICS.items()
        },
    }
    assert {name: report[name] for name in expected} == pytest.approx(expected)
    for name in ("auc", "gauc"):  # those of comparisons
        assert pooled_metric([pooled], name, "all") == pytest.approx(expected[name])


def random_search(seed: int) -> tuple[torch.Tensor, ...]:
    """Queries, targets, items and vectors of small integers; target 99 is not in the catalogue."""
    rng = np.random.default_rng(seed)
    vectors = torch.from_numpy(rng.integers(-1, 2, (ROWS, 2))).float()
    above = torch.from_numpy(rng.integers(0, ROWS, 9))
    items, queries = torch.arange(ROWS) * 3, torch.from_numpy(rng.integers(-1, 2, (9, 2))).float()
    return queries, vectors[above], items[above], items, vectors


@pytest.mark.parametrize("seed", range(8))
def test_recall_and_ndcg_are_their_means_over_random_tie_breaks(
    seed: int,
) -> None:
    queries, targets, target_items, items, vectors = random_search(seed)
    item_above = count_above(queries, targets, target_items, items, vectors)
    actual = retrieval_metrics(*item_above, depths=DEPTHS)
    scores = (queries @ vectors.T).numpy()[:, None] + ORDERS / 10  # [9, 720, 6]
    by_user = np.take_along_axis(scores, (target_items // 3).numpy()[:, None, None], axis=2)
    above = (scores > by_user).sum(axis=2)
    for depth in DEPTHS:
        gains = np.where(above < depth, 1 / np.log2(2 + above), 0)
        assert actual[f"recall@{depth}"] == pytest.approx((above < depth).mean())
        assert actual[f"ndcg@{depth}"] == pytest.approx(gains.mean())
        reciprocal = np.where(above < depth, 1 / (1 + above), 0)
        assert actual[f"mrr@{depth}"] == pytest.approx(reciprocal.mean())


@pytest.mark.parametrize("value", [0.0, 1 / 3])
def test_a_tower_that_gives_all_items_one_vector_scores_as_chance(value: float) -> None:
    items, generator = torch.arange(1000), torch.Generator().manual_seed(0)
    vectors, queries = torch.full((1000, 33), value), torch.randn(40, 33, generator=generator)
    targets = torch.randint(1000, (40,), generator=generator)
    actual = retrieval_metrics(*count_above(queries, vectors[:40], targets, items, vectors))
    gains = 1 / np.log2(2 + np.arange(100))
    for depth in (10, 50, 100):
        assert actual[f"recall@{depth}"] == pytest.approx(depth / 1000)
        assert actual[f"ndcg@{depth}"] == pytest.approx(gains[:depth].sum() / 1000)


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
    report = evaluation_report(scores)
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
