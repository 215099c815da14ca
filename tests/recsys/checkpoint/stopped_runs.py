"""Small training runs in this process that are stopped after a step and go on."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys.config import Config
from recsys.distributed.ranks import joined_ranks
from recsys.training.train import train
from recsys.training.trainer import LossWatch
from tests.recsys.checkpoint.kill_ranks import tensors
from tests.recsys.command_runs import tiny_config

# 60 rows in batches of 8: 8 steps per epoch on one rank, 4 on two.
ARGV = ["--batch_size", "8", "--epochs", "2", "--device", "cpu", "--patience", "9"]


def config_of(folder: Path, *argv: str) -> Config:
    every = ["--checkpoint.every_steps", "3", "--checkpoint.keep", "9"]
    return tiny_config(folder / "cache", *ARGV, *every, *argv)


def run_training(folder: Path, run: Path, *argv: str, **arguments: Any) -> dict[str, Any]:
    with joined_ranks("cpu") as ranks:
        return train(config_of(folder, *argv), str(folder / "data"), run, ranks, **arguments)


class StepsSeen:
    """Positions of each step made, and a signal to this process after one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> None:
        self.steps: list[tuple[int, list[int]]] = []
        original = LossWatch.step

        def step(watch: LossWatch, number: int, loss: Any, positions: Any) -> Any:
            self.steps.append((number, positions.tolist()))
            if number == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(watch, number, loss, positions)

        monkeypatch.setattr(LossWatch, "step", step)


def assert_same_end(run: Path, full_run: Path) -> None:
    """The same bits in the last and best checkpoint, and the same metrics."""
    for name in ("step-00000016", "best"):
        one, two = (tensors(folder / "checkpoints" / name) for folder in (run, full_run))
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert torch.equal(value, two[key]), key
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (run, full_run))
    assert one.pop("train")["steps"] == two.pop("train")["steps"] == 16
    assert one == two
