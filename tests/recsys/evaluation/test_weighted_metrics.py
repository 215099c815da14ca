"""Metrics of rows with weights, and of rows whose labels are null."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.checkpoint.run_schema import schema_of_data
from recsys.data.item_frequency import SUBSETS
from recsys.data.parquet.rows import ParquetRows
from recsys.data.parquet.values import ROW_POSITION
from recsys.data.schema import load_schema
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.bootstrap import METRICS, paired_difference, pooled_metric
from recsys.evaluation.metrics import evaluation_report
from recsys.evaluation.predict import evaluate, predict
from recsys.evaluation.retrieval import retrieval_metrics
from recsys.evaluation.scores import SplitScores, check_same_rows, read_scores, scores_file
from recsys.storage.location import Location
from recsys.training.train import train
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import ranks_of
from tests.recsys.ranking.backbone_runs import backbone_config
from tests.recsys.weighted_data import (
    change_columns,
    table_of,
    write_null_labels,
    write_split,
    write_weighted,
)

COUNTS = ("num_samples", "sum_of_weights")


def random_scores(seed: int, num_rows: int = 300) -> SplitScores:
    rng = np.random.default_rng(seed)
    return SplitScores(
        positions=np.arange(num_rows),
        groups=rng.integers(0, 20, num_rows),
        items=np.arange(num_rows),
        counts=rng.choice([0, 3, 8], num_rows),
        labels=rng.integers(0, 2, (num_rows, 1)).astype(np.float32),
        logits=rng.integers(-3, 3, (num_rows, 1)).astype(np.float32),
        label_names=("liked",),
        weights=rng.integers(0, 4, num_rows).astype(np.float32),
    )


def repeated(scores: SplitScores) -> SplitScores:
    assert scores.weights is not None
    rows = np.repeat(np.arange(len(scores.groups)), scores.weights.astype(int))
    return SplitScores(
        **{name: getattr(scores, name)[rows] for name in ("groups", "items", "counts")},
        positions=np.arange(len(rows)),
        labels=scores.labels[rows],
        logits=scores.logits[rows],
        label_names=scores.label_names,
    )


def report_of(scores: SplitScores) -> dict[str, Any]:
    return evaluation_report(scores)


def assert_same_metrics(report: dict[str, Any], expected: dict[str, Any]) -> None:
    """All but the numbers of rows are equal to rounding, in each part of the items."""
    for subset in SUBSETS:
        rows, reference = (
            (scores if subset == "all" else scores[subset]) for scores in (report, expected)
        )
        assert rows["sum_of_weights"] == reference["num_samples"]
        for name in reference.keys() - {*SUBSETS, *COUNTS, "ids"}:
            assert rows[name] == pytest.approx(reference[name], abs=1e-6), (subset, name)


@pytest.mark.parametrize("seed", range(3))
def test_integer_weights_are_repeated_rows_in_every_metric(seed: int) -> None:
    scores = random_scores(seed)
    assert_same_metrics(report_of(scores), report_of(repeated(scores)))
    for metric in METRICS:
        for kind in SUBSETS:
            pair = [pooled_metric([scores], metric, kind) for scores in (scores, repeated(scores))]
            assert pair[0] == pytest.approx(pair[1], abs=1e-12)


def test_the_interval_of_a_difference_is_that_of_repeated_rows() -> None:
    scores, other = random_scores(0), random_scores(0)
    other.logits[:] += np.random.default_rng(9).normal(size=other.logits.shape)
    for metric in METRICS:
        actual, expected = (
            paired_difference([[make(scores)]], [[make(other)]], metric, "all", samples=50)
            for make in (lambda scores: scores, repeated)
        )
        assert actual is not None and expected is not None
        assert vars(actual) == pytest.approx(vars(expected), abs=1e-12)


def test_recall_and_ndcg_weigh_impressions() -> None:
    above, times = torch.tensor([0, 3, 70, 200]), torch.tensor([2, 1, 3, 1])
    tied = torch.zeros(4, dtype=torch.int64)
    weighted = retrieval_metrics(above, tied, times.float())
    expected = retrieval_metrics(above.repeat_interleave(times), tied.repeat_interleave(times))
    for name in expected.keys() - {"num_samples"}:
        assert weighted[name] == pytest.approx(expected[name], abs=1e-12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datasets, and a run on the one with weights."""
    folder = tmp_path_factory.mktemp("weighted")
    write_weighted(folder)
    config = backbone_config(folder, "dlrm", "none", epochs=1, batch_size=20)
    with joined_ranks("cpu") as ranks:
        train(config, str(folder / "weighted"), folder / "run", ranks)
    return folder


def evaluated(rank: int, world_size: int, folder: Path, data: str) -> dict[str, Any]:
    ranks = ranks_of(rank, world_size)
    return evaluate(folder / "run", str(folder / data), "test", ranks, "cpu")


def test_an_evaluation_weighs_rows_by_the_column_of_its_data(folder: Path) -> None:
    """And scores are kept with the weights of their rows."""
    (expected,) = run_on_ranks(evaluated, 1, folder, "repeated")
    for actual in run_on_ranks(evaluated, 2, folder, "weighted"):
        assert_same_metrics(actual, expected)
    weights = read_scores(scores_file(folder / "run", "test")).weights
    assert weights is not None
    assert weights.tolist() == table_of(folder / "weighted", "test")["times"].to_pylist()


def test_rows_to_predict_need_no_weights_and_a_run_goes_on_with_its_own_alone(
    folder: Path, tmp_path: Path
) -> None:
    rows = table_of(folder / "weighted", "test").drop_columns(["times", "liked"])
    pq.write_table(rows, tmp_path / "rows.parquet")
    with joined_ranks("cpu") as ranks:
        out = tmp_path / "out.parquet"
        predict(folder / "run", [str(tmp_path / "rows.parquet")], out, None, ranks, "cpu")
        assert pq.read_table(out).num_rows == rows.num_rows
        root = Location.of(str(folder / "repeated"))
        with pytest.raises(ValueError, match="'times'"):
            schema_of_data(folder / "run", root, ranks, is_resumed=True)
        assert schema_of_data(folder / "run", root, ranks).weight is None


def rows_of(data: Path, split: str, **options: Any) -> ParquetRows:
    root = Location.of(str(data))
    return ParquetRows.of_split(root, split, load_schema(root), **options)


def test_each_label_has_the_metrics_of_the_rows_that_know_it(tmp_path: Path) -> None:
    data = write_null_labels(tmp_path / "data")
    config = backbone_config(tmp_path, "mmoe", "none", epochs=1, batch_size=20)
    with joined_ranks("cpu") as ranks:
        metrics = train(config, str(data), tmp_path / "run", ranks)
    bought = table_of(data, "test")["bought"]
    assert 0 < bought.null_count < len(bought)
    label_metrics = metrics["test"]["labels"]["bought"]
    assert label_metrics["num_samples"] == len(bought) - bought.null_count
    assert metrics["test"]["labels"]["liked"]["num_samples"] == len(bought)
    scores = read_scores(scores_file(tmp_path / "run", "test"))
    check_same_rows(scores, scores, "itself")
    is_known = ~np.isnan(scores.labels[:, 1])
    assert is_known.tolist() == bought.is_valid().to_pylist()
    assert label_metrics == evaluation_report(scores.take(is_known), 1)


def test_a_row_without_any_label_is_bad_and_a_null_of_another_label_as_before(
    tmp_path: Path,
) -> None:
    data = write_null_labels(tmp_path / "data")
    table = table_of(data, "test")
    bought = pa.array([None, *[1.0] * (table.num_rows - 1)], pa.float32())
    table = table.set_column(table.column_names.index("bought"), "bought", bought)
    liked = table.column_names.index("liked")
    write_split(data, "test", table.set_column(liked, "liked", bought))
    with pytest.raises(ValueError, match=r"'liked', row 0.*null"):
        list(rows_of(data, "test").read(0, table.num_rows))
    change_columns(data, liked={"kind": "label", "nullable": True})
    with pytest.raises(ValueError, match=r"row 0.*'liked', 'bought'"):
        list(rows_of(data, "test").read(0, table.num_rows))
    read = next(rows_of(data, "test", on_bad_row="skip").read(0, table.num_rows))
    assert (read[ROW_POSITION].to_numpy() < 0).tolist() == [True] + [False] * (table.num_rows - 1)
