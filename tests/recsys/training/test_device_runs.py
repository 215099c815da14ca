"""A run on one device: its predictions, checkpoints and package agree with those on CPU.

On a GPU the tables lie on the device, and once in host memory with a cache and prefetching.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from recsys.config import Config, TableSettings
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import evaluate, predict
from recsys.serving import Scorer
from recsys.serving.export import export_run
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.ranks import require_gpus
from tests.recsys.command_runs import assert_same_metrics
from tests.recsys.em3_runs import TABLES, em3_config
from tests.recsys.serving.serving_runs import requests

pytestmark = pytest.mark.long

CLOSE = {"cpu": 1e-6, "cuda": 1e-4}  # a GPU adds up in another order


def on_gpu(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.gpu)


def config_of(folder: Path, tables: str = "fused") -> Config:
    config = em3_config(folder, table_optimizer="rowwise_adagrad", epochs=1)
    if tables == "half":
        config.embedding.precision = "fp16"
    if tables == "cached":
        settings = TableSettings(kernel="uvm_caching", cache_load_factor=0.5)
        config.embedding.tables, config.embedding.prefetch = dict.fromkeys(TABLES, settings), True
    return config


@pytest.fixture(
    scope="module",
    params=[
        *(("cpu", "fused"), ("cpu", "half")),
        *(on_gpu(("cuda", tables)) for tables in ("fused", "cached", "half")),
    ],
    ids="-".join,
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The device, and the folder of dataset and run."""
    device, tables = request.param
    require_gpus(1 if device == "cuda" else 0)
    folder = tmp_path_factory.mktemp("run")
    write_dataset(folder / "data")
    with joined_ranks(device) as ranks:
        train(config_of(folder, tables), str(folder / "data"), folder / "run", ranks)
    return device, folder


def predicted(folder: Path, device: str) -> np.ndarray:
    out = folder / f"predicted_on_{device}.parquet"
    with joined_ranks(device) as ranks:  # type: ignore[arg-type]
        predict(folder / "run", [str(folder / "data" / "test")], out, None, ranks, device)
    return pq.read_table(out)["prediction_liked"].to_numpy()


def test_the_best_model_that_was_stored_is_the_one_that_was_tested(run: Any) -> None:
    device, folder = run
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    with joined_ranks(device) as ranks:
        assert_same_metrics(evaluate(folder / "run", None, "test", ranks, device), metrics["test"])


def test_predictions_equal_those_on_cpu_and_those_of_the_package(run: Any) -> None:
    device, folder = run
    actual = predicted(folder, device)
    np.testing.assert_allclose(actual, predicted(folder, "cpu"), rtol=0, atol=CLOSE[device])
    with joined_ranks(device) as ranks:
        export_run(folder / "run", folder / "package", "fp32", ranks)
    scorer = Scorer.load(folder / "package")
    scores = [scorer.score(**request)[0, 0] for request in requests(folder / "data")]
    np.testing.assert_allclose(scores, actual, rtol=0, atol=CLOSE[device])


@pytest.mark.parametrize("tables", ["fused", "half"])
@pytest.mark.parametrize(
    ("first", "second"), [("cpu", "cpu"), on_gpu("cpu", "cuda"), on_gpu("cuda", "cpu")]
)
def test_a_run_goes_on_on_another_device(
    tmp_path: Path, first: str, second: str, tables: str
) -> None:
    require_gpus(1 if "cuda" in (first, second) else 0)
    write_dataset(tmp_path / "data")
    for device, epochs in ((first, 1), (second, 2)):
        with joined_ranks(device) as ranks:  # type: ignore[arg-type]
            config = replace(config_of(tmp_path, tables), epochs=epochs)
            metrics = train(config, str(tmp_path / "data"), tmp_path / "run", ranks)
        assert metrics["train"]["steps"] == epochs * 8
