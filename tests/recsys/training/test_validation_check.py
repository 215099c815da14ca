"""Jobs that cannot end well say so on every rank: useless validation, absurd settings, bad rows."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import recsys.build
from recsys.cli import main
from recsys.config import BestModelBy, load_config
from recsys.data.parquet.rows import ParquetRows
from recsys.data.row_source import RowSource
from recsys.data.schema import load_schema
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.evaluation.model_selection import require_useful, selection_score
from recsys.evaluation.predict import load_run
from recsys.storage.location import Location
from recsys.training.train import train
from recsys.training.trainer import Trainer
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import TINY, run_recsys, train_argv
from tests.recsys.em3_runs import ranks_of
from tests.recsys.ranking.backbone_runs import backbone_config
from tests.recsys.weighted_data import table_of, write_split

# Of the rows of `validation`: label by row, where users are 0 0 1 1 2 2 ...
LABELS = {
    "positives": [1] * 12,
    "negatives": [0] * 12,
    "users of one label": [1, 1, 0, 0] * 3,
    "users of both": [1, 0] * 6,
}


def write_rows(folder: Path, split: str, **columns: Any) -> None:
    """Replace columns of a split by others, in one file."""
    table = pq.read_table(folder / split)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    for file in (folder / split).glob("*.parquet"):
        file.unlink()
    pq.write_table(table, folder / split / "part-0.parquet")


def dataset(folder: Path, labels: list[int]) -> Path:
    data = write_dataset(folder, {"train": 40, "valid": len(labels), "test": 20}, num_items=30)
    users = np.arange(len(labels)) // 2 % 10
    write_rows(data, "valid", liked=np.array(labels, np.float32), user=users)
    return data


class Stepped(Exception):
    """Training has begun."""


def begin(rank: int, world_size: int, folder: Path, best: dict[str, list[BestModelBy]]) -> Any:
    """The error of a run before its first step, or the word `steps`, by labels and metric."""

    def stop(self: Trainer) -> NoReturn:
        raise Stepped

    Trainer.train = stop  # type: ignore[method-assign]
    actual = {}
    for labels, metrics in best.items():
        for metric in metrics:
            config = backbone_config(folder, "two_tower in_batch", "none", best_model_by=metric)
            data, run = folder / labels, folder / f"{labels} {metric}"
            try:
                train(config, str(data), run, ranks_of(rank, world_size))
            except (Stepped, ValueError) as error:
                actual[labels, metric] = str(error) or "steps"
    return actual


def test_validation_that_cannot_choose_a_model_is_refused_before_the_first_step(
    tmp_path: Path,
) -> None:
    for name, labels in LABELS.items():
        dataset(tmp_path / name, labels)
    cases: dict[str, list[BestModelBy]] = {
        "positives": ["auc", "recall"],
        "negatives": ["ndcg"],
        "users of one label": ["gauc", "auc_and_gauc", "all_and_unseen"],
        "users of both": ["gauc"],
    }
    for actual in run_on_ranks(begin, 2, tmp_path, cases):
        works = {case for case, message in actual.items() if message == "steps"}
        assert works == {
            ("positives", "recall"),
            ("users of one label", "auc_and_gauc"),
            ("users of one label", "all_and_unseen"),
            ("users of both", "gauc"),
        }
        for (labels, metric), message in actual.items():
            if message != "steps":
                assert f"{labels}/valid" in message and f"best_model_by {metric}" in message
                assert "'liked'" in message
        assert "best_model_by: recall" in actual["positives", "auc"]
        assert "best_model_by: auc" in actual["users of one label", "gauc"]


def test_a_two_tower_model_trains_validates_and_stops_on_positives_alone(tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", [1] * 24)
    for split, count in (("train", 40), ("test", 20)):
        write_rows(data, split, liked=np.ones(count, np.float32))
    config = backbone_config(tmp_path, "two_tower in_batch", "none", best_model_by="recall")
    config = replace(config, epochs=2, patience=1, batch_size=20)
    with joined_ranks("cpu") as ranks:
        metrics = train(config, str(data), tmp_path / "run", ranks)
        load_run(tmp_path / "run", None, ranks, "cpu")
    assert metrics["valid"]["auc"] is None
    assert selection_score(metrics["valid"], "recall") == metrics["valid"]["retrieval"]["recall@10"]
    assert 0 < metrics["test"]["retrieval"]["recall@10"] < 1


def test_recall_chooses_no_model_of_a_small_catalogue(tmp_path: Path) -> None:
    config = backbone_config(tmp_path, "two_tower", "none", best_model_by="recall")
    data = write_dataset(tmp_path / "data", num_items=9)
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match="catalogue of 9"):
        train(config, str(data), tmp_path / "run", ranks)


def test_a_column_of_a_wrong_type_is_refused_before_items_are_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(tmp_path / "data", LABELS["users of both"])
    write_rows(data, "test", price=np.zeros(20, "datetime64[us]"))

    def encode(*arguments: Any) -> NoReturn:
        raise AssertionError("items are encoded")

    monkeypatch.setattr(recsys.build, "build_content", encode)
    config = backbone_config(tmp_path, "dlrm", "qformer")
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match=r"price.*timestamp"):
        train(config, str(data), tmp_path / "run", ranks)


def test_unscaled_numbers_are_named_and_a_useless_model_ends_the_command_with_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = write_dataset(tmp_path / "data"), tmp_path / "run"
    for file in data.glob("*/*.parquet"):
        table = pq.read_table(file)
        index = table.schema.get_field_index("price")
        if index >= 0:
            seconds = 1.7e9 + 1e7 * np.random.default_rng(0).random(table.num_rows)
            prices = pa.array(seconds, pa.float32())
            pq.write_table(table.set_column(index, "price", prices), file)

    assert main(train_argv(data, tmp_path / "scaled")) == 0  # by default
    assert "standardized: 'price', 1.7" in capsys.readouterr().out
    assert main(train_argv(data, run, "--ranking.scale_inputs", "false")) == 1
    printed = capsys.readouterr()
    assert "dense column 'price' goes from 1.7" in printed.out
    assert "log loss" in printed.err and "'price' (1.70003e+09 to 1.70997e+09)" in printed.err
    assert (run / "metrics.json").is_file() and (run / "checkpoints" / "best").is_dir()
    assert main(["evaluate", "--run", str(run), "--data", str(data), "--device", "cpu"]) == 0


def test_errors_far_above_those_of_a_constant_are_refused(tmp_path: Path) -> None:
    root = Location.of(str(write_dataset(tmp_path)))

    def require(metrics: dict[str, Any]) -> None:
        def rows() -> RowSource:
            return ParquetRows.of_split(root, "valid", load_schema(root))

        require_useful(metrics, "valid", rows, "")

    for loss in (None, 0.0, math.log(2), 1.38):
        require({"logloss": loss})
    for ratio in (None, 0.2, 2.0):
        require({"rmse": 9.0, "nrmse": ratio})
    for loss in (1.39, 2.5e31, math.inf, math.nan):
        with pytest.raises(ValueError, match="valid"):
            require({"logloss": loss})
    for useless in ({"logloss": 3.0}, {"rmse": 9.0, "nrmse": 2.1}):
        labels = {"clicked": {"logloss": 0.5}, "bought": useless}
        with pytest.raises(ValueError, match=r"valid.*'bought'"):
            require({"logloss": 0.5, "labels": labels})


def test_the_command_ends_with_the_cause_from_each_rank_before_anything_is_written(
    tmp_path: Path,
) -> None:
    """Rank 1 alone meets the bad row, in a split that is read after the first training steps."""
    data = write_dataset(tmp_path / "data", {"train": 61, "valid": 25, "test": 23})
    rows = table_of(data, "valid")
    items = pa.array([*rows["item"].to_pylist()[:-1], 77])
    write_split(data, "valid", rows.set_column(rows.column_names.index("item"), "item", items))
    out = tmp_path / "run"

    process = run_recsys(*train_argv(data, out), ranks=2)

    assert process.returncode != 0
    cause = "valid/part-0.parquet: column 'item', row 24: id 77 is outside [0, 30)"
    lines = [line for line in process.stderr.splitlines() if "error: " in line and cause in line]
    assert any(line.startswith("rank 0: error: rank 1: ") for line in lines), process.stderr
    assert any(line.startswith("rank 1: error: ") for line in lines), process.stderr
    assert not out.exists()


UNEVEN = (3, 13, 14)


def train_unevenly(rank: int, world_size: int, folder: Path) -> list[tuple[int, int]]:
    """Steps, and rows validated, for each number of training rows."""
    ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
    argv = ["--batch_size", "4", "--cache", str(folder / "cache"), "--device", "cpu"]
    config = load_config(TINY, argv)
    results = []
    for rows in UNEVEN:
        metrics = train(config, str(folder / str(rows)), folder / f"run-{rows}", ranks)
        results.append((metrics["train"]["steps"], metrics["valid"]["num_samples"]))
    return results


def test_three_ranks_finish_whatever_the_number_of_rows(tmp_path: Path) -> None:
    """Shares of one row each; of 5, 4 and 4, where 5 are two batches and 4 one; of 5, 5 and 4.
    The test split has fewer rows than ranks."""
    for rows in UNEVEN:
        write_dataset(tmp_path / str(rows), {"train": rows, "valid": 13, "test": 2})
    for result in run_on_ranks(train_unevenly, 3, tmp_path):
        assert result == [(1, 13), (2, 13), (2, 13)]
