"""Runs with optimizers, schedules and averages: one's own from a file, and their checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from recsys.build import build_job
from recsys.checkpoint.reader import SafeFileSystemReader
from recsys.config import load_config
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.training.train import train, training_interactions
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import TINY, run_recsys, tiny_config, train_argv
from tests.recsys.em3_runs import ranks_of

ARGV = ["--batch_size", "8", "--device", "cpu", "--patience", "9", "--content", "none"]
ARGV += ["--neighbours", "{values: history_liked, dim: 4, taste_dim: 4}"]
SETTINGS: dict[str, dict[str, Any]] = {
    "adafactor": {
        "name": "adafactor",
        "clip_norm": 0.5,
        "schedule": "cosine",
        "decay_steps": 12,
        "ema_decay": 0.9,
        "ema_tables": True,
    },
    "adam": {"name": "adam", "ema_decay": 0.5},
}
OWN_STEPS = '''\
import torch


class SignDescent(torch.optim.Optimizer):
    """Steps by the sign of the gradient, so often that a Python number counts it."""

    def __init__(self, groups, scale):
        super().__init__(groups, {"scale": scale})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["steps"] = self.state[parameter].get("steps", 0) + 1
                    parameter -= group["lr"] * group["scale"] * parameter.grad.sign()


def staircase(step, decay_steps, every):
    return 0.5 ** (step // every)
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("optimizer_runs") / "data")


def trained(data: Path, run: Path, ranks: Ranks, name: str, epochs: int) -> dict[str, Any]:
    recipe = data.parent / f"{run.name}-{ranks.rank}.yaml"
    settings = yaml.safe_load(TINY.read_text()) | {"optimizer": SETTINGS[name]}
    settings["validations_per_epoch"] = 2 if name == "adafactor" else 1
    recipe.write_text(yaml.safe_dump(settings))
    config = load_config(recipe, [*ARGV, "--epochs", str(epochs)])
    return train(config, str(data), run, ranks)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, whole."""
    reader = SafeFileSystemReader(folder)
    metadata: dict[str, Any] = dict(reader.entries)
    state = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in metadata.items()
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def assert_equal_ends(one: Path, other: Path) -> dict[str, torch.Tensor]:
    for name in ("best", sorted(p.name for p in (one / "checkpoints").glob("step-*"))[-1]):
        expected, actual = stored(one / "checkpoints" / name), stored(other / "checkpoints" / name)
        assert expected.keys() == actual.keys()
        for key, value in expected.items():
            assert torch.equal(value, actual[key]), key
    return actual


def train_and_resume(rank: int, world_size: int, data: Path, folder: Path) -> None:
    ranks = ranks_of(rank, world_size)
    trained(data, folder / "whole", ranks, "adafactor", epochs=2)
    trained(data, folder / "parts", ranks, "adafactor", epochs=1)
    trained(data, folder / "parts", ranks, "adafactor", epochs=2)


def test_a_run_on_two_ranks_goes_on_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    run_on_ranks(train_and_resume, 2, data, tmp_path)
    state = assert_equal_ends(tmp_path / "whole", tmp_path / "parts")
    assert int(state["optimizer.average.num_updates"]) == 8
    assert any(key.startswith("optimizer.average.embedding") for key in state)
    assert any("row_var" in key for key in state)
    assert state["model.neighbours.taste"].any()


def test_the_best_model_holds_the_averages_and_training_goes_on_without_them(
    data: Path, tmp_path: Path
) -> None:
    with joined_ranks("cpu") as ranks:
        trained(data, tmp_path / "run", ranks, "adam", epochs=1)
    best, last = (stored(tmp_path / "run/checkpoints" / name) for name in ("best", "step-00000008"))
    prefix = "optimizer.average."
    averages = {k.removeprefix(prefix): v for k, v in last.items() if k.startswith(prefix)}
    assert averages.pop("num_updates") == 8
    assert averages
    for name, value in averages.items():
        assert torch.equal(best[f"model.{name}"], value), name
    assert any(not torch.equal(last[f"model.{name}"], value) for name, value in averages.items())
    tables = [name for name in best if name.startswith("model.embedding")]
    assert tables and all(torch.equal(best[name], last[name]) for name in tables)


def test_decay_ends_with_the_last_update_where_validations_cut_groups_of_steps(
    data: Path, tmp_path: Path
) -> None:
    argv = ["--accumulate_steps", "3", "--validations_per_epoch", "4", "--epochs", "2"]
    schedule = ["--optimizer.schedule", "linear", "--optimizer.warmup_steps", "0"]
    config = tiny_config(tmp_path / "cache", *ARGV, *argv, *schedule)
    with joined_ranks("cpu") as ranks:
        job = build_job(config, str(data), ranks)
        assert training_interactions(job).num_batches == 8  # 4 parts of 2 steps, an update each
    share = job.schedule.lr_lambdas[0]
    assert [share(update) for update in (0, 4, 8)] == [1.0, 0.5, 0.0]


def test_an_optimizer_and_a_schedule_of_one_s_own_are_a_file_and_two_lines(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_steps.py").write_text(OWN_STEPS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        TINY.read_text()
        + "optimizer: {name: own_steps:SignDescent, options: {scale: 2.0},\n"
        + "  schedule: own_steps:staircase, schedule_options: {every: 2}}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    argv = train_argv(data, tmp_path / "run", "--content", "none")
    argv[argv.index(str(TINY))] = str(recipe)
    process = run_recsys(*argv)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "SignDescent" in (tmp_path / "run" / "plan.txt").read_text()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train"]["steps"] == 8
    state = stored(tmp_path / "run" / "checkpoints" / "step-00000008")
    counts = [value for name, value in state.items() if name.endswith(".steps#int")]
    assert counts and all(count == 8 for count in counts)
