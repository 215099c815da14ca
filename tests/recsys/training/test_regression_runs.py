"""Runs whose labels are numbers, alone and beside labels of 0 and 1, through every command."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config import Config
from recsys.diagnostics.run_report.command import report_run
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.compare import compare_runs, format_comparison
from recsys.evaluation.evaluate import format_evaluation
from recsys.evaluation.predict import evaluate, predict
from recsys.evaluation.scores import read_scores, scores_file
from recsys.serving.export import export_run
from recsys.serving.scorer import Scorer
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.recsys.ranking.backbone_runs import backbone_config
from tests.recsys.weighted_data import SPLITS, change_columns, table_of, write_split

NUMBERS: dict[str, dict[str, object]] = {
    "stars": {"kind": "label", "loss": "mse"},
    "clicks": {"kind": "label", "loss": "poisson", "nullable": True},
}


def write_numbers(data: Path) -> Path:
    """The dataset with stars, and clicks that are null in some rows, before `liked`."""
    write_dataset(data)
    for number, split in enumerate(SPLITS):
        table = table_of(data, split)
        rng = np.random.default_rng(number)
        stars = table["liked"].to_numpy() + rng.random(table.num_rows) - 1  # of mean 0
        clicks = pa.array(rng.poisson(1.0, table.num_rows), mask=rng.random(table.num_rows) < 0.3)
        table = table.append_column("stars", pa.array(stars)).append_column("clicks", clicks)
        write_split(data, split, table)
    change_columns(data, liked=None, **NUMBERS)
    change_columns(data, liked={"kind": "label"})
    return data


def config_of(folder: Path, backbone: str, **settings: Any) -> Config:
    settings = {"epochs": 1, "batch_size": 20, "best_model_by": "rmse"} | settings
    return backbone_config(folder, backbone, "none", **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one label, `one`, and of three, `three`."""
    folder = tmp_path_factory.mktemp("numbers")
    write_numbers(folder / "three labels")
    shutil.copytree(folder / "three labels", folder / "one label")
    change_columns(folder / "one label", liked=None, clicks=None)
    with joined_ranks("cpu") as ranks:
        for name, backbone in (("one", "dlrm"), ("three", "mmoe")):
            data = str(folder / f"{name} label{'s' * (name == 'three')}")
            train(config_of(folder, backbone), data, folder / name, ranks)
    return folder


def predicted(folder: Path, run: str) -> pa.Table:
    out = folder / f"{run}.parquet"
    files = [str(folder / "one label" / "test")]
    with joined_ranks("cpu") as ranks:
        predict(folder / run, files, out, None, ranks, "cpu")
    return pq.read_table(out)


def test_each_label_has_its_metrics_and_predictions_in_its_own_unit(folder: Path) -> None:
    test = json.loads((folder / "three" / "metrics.json").read_text())["test"]
    scores = read_scores(scores_file(folder / "three", "test"))
    assert scores.losses == ("mse", "poisson", "bce")
    table, logits = predicted(folder, "three"), scores.logits.astype(np.float64)
    expected = {
        "stars": logits[:, 0],
        "clicks": np.exp(logits[:, 1]),
        "liked": 1 / (1 + np.exp(-logits[:, 2])),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(table[f"prediction_{name}"], values, rtol=1e-5)
    labels, is_known = test["labels"], ~np.isnan(scores.labels[:, 1])
    error = expected["clicks"][is_known] - scores.labels[is_known, 1]
    assert labels["clicks"]["rmse"] == pytest.approx((error**2).mean() ** 0.5, rel=1e-5)
    assert labels["clicks"]["num_samples"] == is_known.sum() < len(is_known)
    assert test["rmse"] == labels["stars"]["rmse"] and "auc" in labels["liked"]
    shown = format_evaluation(test, config_of(folder, "mmoe").ranking)
    assert shown.count("  rmse") == 2 and shown.count("gauc") == 1


def test_a_run_of_one_number_is_evaluated_compared_reported_and_served(
    folder: Path, tmp_path: Path
) -> None:
    run, other = folder / "one", tmp_path / "other"
    metrics = json.loads((run / "metrics.json").read_text())
    shutil.copytree(run, other)
    with joined_ranks("cpu") as ranks:
        again = evaluate(run, None, "test", ranks, "cpu")
        assert again["rmse"] == pytest.approx(metrics["test"]["rmse"], abs=1e-6)
        report_run(run, None, tmp_path / "page.html", ranks, "cpu", None)
        page = (tmp_path / "page.html").read_text()
        assert "RMSE" in page and "GAUC" not in page.split("<h2>Configuration")[0]
        export_run(run, tmp_path / "package", "fp32", ranks)
    compared = compare_runs([run, other], "test")
    assert compared["metrics"] == ["rmse", "mae"]
    assert compared["runs"][1]["all"]["difference"]["rmse"]["value"] == 0
    assert "rmse" in format_comparison(compared)
    request = json.loads((tmp_path / "package" / "request.json").read_text())
    scorer = Scorer.load(tmp_path / "package")
    served = scorer.score(request["user"], request["history"], request["candidates"])
    first = predicted(folder, "one")["prediction_stars"][0].as_py()
    assert served[0, 0] == pytest.approx(first, abs=1e-5)
