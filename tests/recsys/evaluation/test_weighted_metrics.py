"""Metrics of weighted rows are those of rows that are there as often as their weight says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.checkpoint.run_schema import schema_of_data
from recsys.data.filesystem import Location
from recsys.data.item_frequency import PARTS
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.bootstrap import paired_difference, pooled_metric
from recsys.evaluation.measures import METRICS
from recsys.evaluation.metrics import evaluation_report
from recsys.evaluation.predict import evaluate, predict
from recsys.evaluation.retrieval import retrieval_metrics
from recsys.evaluation.scores import SplitScores, read_scores, scores_file
from recsys.training.train import train
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import ranks_of
from tests.recsys.ranking.backbone_runs import backbone_config
from tests.recsys.weighted_data import change_columns, table_of, write_split, write_weighted

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
    of = scores.counted(0)
    return evaluation_report(
        of.labels[:, 0], of.logits[:, 0], of.groups, of.counts, weights=of.weights
    )


def assert_same_metrics(report: dict[str, Any], expected: dict[str, Any]) -> None:
    """All but the numbers of rows are equal to rounding, in each part of the items."""
    for part in PARTS:
        of, wanted = ((each if part == "all" else each[part]) for each in (report, expected))
        assert of["sum_of_weights"] == wanted["num_samples"]
        for name in wanted.keys() - {*PARTS, *COUNTS, "ids"}:
            assert of[name] == pytest.approx(wanted[name], abs=1e-6), (part, name)


@pytest.mark.parametrize("seed", range(3))
def test_integer_weights_are_repeated_rows_in_every_metric(seed: int) -> None:
    scores = random_scores(seed)
    assert_same_metrics(report_of(scores), report_of(repeated(scores)))
    for metric in METRICS:
        for part in PARTS:
            pair = [pooled_metric([each], metric, part) for each in (scores, repeated(scores))]
            assert pair[0] == pytest.approx(pair[1], abs=1e-12)


def test_the_interval_of_a_difference_is_that_of_repeated_rows() -> None:
    scores, other = random_scores(0), random_scores(0)
    other.logits[:] += np.random.default_rng(9).normal(size=other.logits.shape)
    for metric in METRICS:
        found, wanted = (
            paired_difference([[make(scores)]], [[make(other)]], metric, "all", samples=50)
            for make in (lambda each: each, repeated)
        )
        assert found is not None and wanted is not None
        assert vars(found) == pytest.approx(vars(wanted), abs=1e-12)


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
    for found in run_on_ranks(evaluated, 2, folder, "weighted"):
        assert_same_metrics(found, expected)
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
            schema_of_data(folder / "run", root, ranks, goes_on=True)
        assert schema_of_data(folder / "run", root, ranks).weight is None


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "null"), (-1.0, "-1"), (float("nan"), "nan"), (float("inf"), "inf")],
)
def test_an_unusable_weight_is_refused(tmp_path: Path, value: float | None, said: str) -> None:
    data, _ = write_weighted(tmp_path)
    table = table_of(data, "test")
    times = [1.0, value, *[2.0] * (table.num_rows - 2)]
    place = table.column_names.index("times")
    write_split(data, "test", table.set_column(place, "times", pa.array(times, pa.float64())))
    rows = ParquetRows.of_split(Location.of(str(data)), "test", load_schema(Location.of(str(data))))
    with pytest.raises(ValueError, match=f"(?s)'times', row 1.*{said}"):
        list(rows.read(0, rows.num_rows))


def test_a_second_column_of_weights_is_refused_and_a_split_without_any_weight(
    folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder / "weighted", data)
    change_columns(data, price={"kind": "weight"})
    with pytest.raises(ValueError, match=r"'times'"):
        load_schema(Location.of(str(data)))
    change_columns(data, price={"kind": "dense"})
    table = table_of(data, "test")
    place, zeros = table.column_names.index("times"), pa.array(np.zeros(table.num_rows))
    write_split(data, "test", table.set_column(place, "times", zeros))
    config = backbone_config(tmp_path, "dlrm", "none")
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match=r"test.*'times'"):
        train(config, str(data), tmp_path / "run", ranks)
