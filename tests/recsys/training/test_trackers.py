"""Trackers record settings and metrics through their own clients, or a class of the user's."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recsys.build import Job
from recsys.checkpoint.progress import Progress
from recsys.config import Config, load_config
from recsys.distributed.log import configure_logging
from recsys.distributed.ranks import joined_ranks
from recsys.training.trackers import Reporter, make_trackers
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import TINY
from tests.recsys.em3_runs import ranks_of

SETTINGS = {"optimizer.learning_rate": 0.001, "tracker": ["mlflow"]}


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def stored_runs(folder: Path) -> list[Any]:
    """All that MLflow's own client reads from a store of files."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=folder.absolute().as_uri())
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


def test_a_run_that_goes_on_is_one_run_of_mlflow(tmp_path: Path, no_server: None) -> None:
    for first_step in (0, 3):
        (tracker,) = make_trackers(["mlflow"], tmp_path, SETTINGS, first_step)
        tracker.log({"train/loss": 1.0 / (first_step + 1)}, first_step + 1)
        tracker.close()

    (run,) = stored_runs(tmp_path / "mlflow")
    assert run.data.metrics == {"train/loss": 0.25}


def test_names_that_mlflow_refuses_are_written_with_its_characters(
    tmp_path: Path, no_server: None
) -> None:
    (tracker,) = make_trackers(["mlflow"], tmp_path, {"metrics.p@10.metric": "precision_at_k"}, 0)
    tracker.log({"valid/p@10": 0.5, "valid/bought?/auc": 0.75}, 1)
    tracker.close()

    (run,) = stored_runs(tmp_path / "mlflow")
    assert run.data.params == {"metrics.p_at_10.metric": "precision_at_k"}
    assert run.data.metrics == {"valid/p_at_10": 0.5, "valid/bought_/auc": 0.75}


def test_wandb_gets_settings_metrics_and_the_run_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is a stand-in, as the real one wants a service."""
    calls: list[Any] = []

    class Run:
        id = "abc"

        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((values, step))

        def finish(self) -> None:
            calls.append("finish")

    def init(**arguments: Any) -> Run:
        calls.append((arguments["config"], arguments["id"], arguments["resume"]))
        return Run()

    client: Any = ModuleType("wandb")
    client.init = init
    monkeypatch.setitem(sys.modules, "wandb", client)
    for first_step in (0, 3):
        (tracker,) = make_trackers(["wandb"], tmp_path, SETTINGS, first_step)
        tracker.log({"train/loss": 0.5}, first_step + 1)
        tracker.close()
    assert calls == [
        (SETTINGS, None, None), ({"train/loss": 0.5}, 1), "finish",
        (SETTINGS, "abc", "allow"), ({"train/loss": 0.5}, 4), "finish",
    ]  # fmt: skip


def test_a_client_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tracker wandb needs the extra `trackers`"):
        make_trackers(["wandb"], tmp_path, {}, 0)


OWN_TRACKER = """
class Lines:
    def __init__(self, run, settings, first_step):
        self.file = open(run / "lines.txt", "a" if first_step else "w")
        self.file.write(f"batch_size {settings['batch_size']}\\n")

    def log(self, values, step):
        self.file.writelines(f"{step} {name}\\n" for name in values)

    def close(self):
        self.file.close()
"""


def test_a_run_feeds_tensorboard_mlflow_and_a_tracker_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_server: None
) -> None:
    (tmp_path / "my_tracker.py").write_text(OWN_TRACKER)
    monkeypatch.syspath_prepend(tmp_path)
    data = write_dataset(tmp_path / "data", {"train": 33, "valid": 20, "test": 20})
    argv = ["--content", "none", "--batch_size", "16", "--epochs", "1", "--device", "cpu"]
    argv += ["--contrastive.weight", "0", "--log_every_steps", "1"]
    argv += ["--tracker", "[tensorboard, mlflow, 'my_tracker:Lines']"]
    with joined_ranks("cpu") as ranks:
        metrics = train(load_config(TINY, argv), str(data), tmp_path / "run", ranks)

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"train/loss", "train/samples_per_second", "valid/auc", "test/auc"} <= names
    (run,) = stored_runs(tmp_path / "run" / "mlflow")
    assert set(run.data.metrics) == names
    assert run.data.metrics["test/auc"] == metrics["test"]["auc"]
    assert run.data.params["batch_size"] == "16"
    lines = (tmp_path / "run" / "lines.txt").read_text().splitlines()
    assert lines[0] == "batch_size 16" and {"1 train/loss", "3 test/auc"} <= set(lines)


def report_a_step(rank: int, world_size: int, run: Path) -> None:
    job: dict[str, Any] = {"ranks": ranks_of(rank, world_size), "config": Config()}
    job |= {"pipeline": SimpleNamespace(has_stepped=False), "em3": SimpleNamespace(content=None)}
    reporter = Reporter(cast(Job, SimpleNamespace(**job)), run, Progress())
    progress = Progress(steps=1, batches=1, samples=4, seconds=2.0)
    reporter.begin(1, progress)
    reporter.step(progress, {"loss": torch.tensor([1.0, 4.0][rank])})
    reporter.close()


def test_the_loss_of_a_step_is_the_mean_over_the_ranks(tmp_path: Path) -> None:
    run_on_ranks(report_a_step, 2, tmp_path)

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [2.5]


def test_a_tracker_that_fails_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = "class Fails:\n    def __init__(self, *given): pass\n    def close(self): pass\n"
    failing += "    def log(self, values, step): raise OSError('no service')\n"
    (tmp_path / "failing_tracker.py").write_text(failing)
    monkeypatch.syspath_prepend(tmp_path)
    configure_logging()
    data = write_dataset(tmp_path / "data", {"train": 16, "valid": 20, "test": 20})
    argv = ["--content", "none", "--batch_size", "16", "--epochs", "1", "--device", "cpu"]
    argv += ["--contrastive.weight", "0", "--tracker", "failing_tracker:Fails"]
    with joined_ranks("cpu") as ranks:
        train(load_config(TINY, argv), str(data), tmp_path / "run", ranks)
    assert "Fails failed, " in capsys.readouterr().out
