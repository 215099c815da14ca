"""`recsys search` with real trainings, killed in the middle of one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recsys.config import load_config
from tests.datasets import write_dataset
from tests.recsys.command_runs import run_recsys
from tests.recsys.search.test_search import TINY, waited_for

SPACE = {
    "optimizer.learning_rate": {"low": 0.001, "high": 0.1, "log": True},
    "ranking.mlp_units": {"choices": [[8], [16]]},
}


@pytest.mark.long
def test_a_killed_search_ends_as_another_and_its_best_trains_to_the_same_figures(
    tmp_path: Path,
) -> None:
    write_dataset(tmp_path / "data", {"train": 300, "valid": 90, "test": 30})
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    argv = ["search", "--config", str(TINY), "--data", "data", "--space", "space.yaml"]
    argv += ["--content", "none", "--trials", "2", "--epochs", "2", "--batch_size", "16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "recsys.cli", *argv, "--out", "killed"]

    with subprocess.Popen(command, cwd=tmp_path, env=environment) as search:
        run = tmp_path / "killed" / "trials" / "0000" / "run-0"
        waited_for(run / "validations.jsonl")
        search.send_signal(signal.SIGKILL)
    for out in ("killed", "whole"):
        process = run_recsys(*argv, "--out", out, folder=tmp_path, environment=environment)
        assert process.returncode == 0, process.stderr

    def metrics(folder: str) -> list[object]:
        files = sorted((tmp_path / folder / "trials").glob("*/run-0/metrics.json"))
        return [json.loads(file.read_text())["valid"] for file in files]

    assert metrics("killed") == metrics("whole") and len(metrics("whole")) == 2
    best = tmp_path / "whole" / "best.yaml"
    assert load_config(tmp_path / "killed" / "best.yaml") == load_config(best)

    retrained = ["train", "--config", str(best), "--data", "data", "--out", "again"]
    process = run_recsys(*retrained, folder=tmp_path, environment=environment)
    assert process.returncode == 0, process.stderr
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())["valid"]
    assert again == max(metrics("whole"), key=lambda valid: valid["auc"])
