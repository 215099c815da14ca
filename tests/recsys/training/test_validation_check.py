"""What validation needs is known before the first step: labels, users of both, types of columns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import recsys.build
from recsys.config import BestModelBy
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.model_selection import selection_score
from recsys.evaluation.predict import load_run
from recsys.training.train import train
from recsys.training.trainer import Trainer
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import ranks_of
from tests.recsys.ranking.backbone_runs import backbone_config

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
        for by in metrics:
            config = backbone_config(folder, "two_tower in_batch", "none", best_model_by=by)
            data, run = folder / labels, folder / f"{labels} {by}"
            try:
                train(config, str(data), run, ranks_of(rank, world_size))
            except (Stepped, ValueError) as error:
                actual[labels, by] = str(error) or "steps"
    return actual


def test_validation_that_cannot_choose_a_model_is_refused_before_the_first_step(
    tmp_path: Path,
) -> None:
    for name, labels in LABELS.items():
        dataset(tmp_path / name, labels)
    cases: dict[str, list[BestModelBy]] = {
        "positives": ["auc", "recall"],
        "negatives": ["ndcg"],
        "users of one label": ["gauc"],
        "users of both": ["gauc"],
    }
    for actual in run_on_ranks(begin, 2, tmp_path, cases):
        works = {case for case, message in actual.items() if message == "steps"}
        assert works == {("positives", "recall"), ("users of both", "gauc")}
        for (labels, by), message in actual.items():
            if message != "steps":
                assert f"{labels}/valid" in message and f"best_model_by {by}" in message
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

    def encode(*parts: Any) -> NoReturn:
        raise AssertionError("items are encoded")

    monkeypatch.setattr(recsys.build, "build_content", encode)
    config = backbone_config(tmp_path, "dlrm", "qformer")
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match=r"price.*timestamp"):
        train(config, str(data), tmp_path / "run", ranks)
