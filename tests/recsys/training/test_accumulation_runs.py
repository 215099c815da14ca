"""A run that accumulates gradients: its steps, its stops and how it goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recsys.checkpoint.files import folders_by_age
from recsys.distributed.lockstep import TrainingStopped
from tests.datasets import write_dataset
from tests.recsys.checkpoint.stopped_runs import StepsSeen, assert_same_end, run_training

# Two epochs of 8 batches, each with a validation in its middle: groups of 3 and 1, twice.
GROUP = ["--accumulate_steps", "3", "--validations_per_epoch", "2", "--log_every_steps", "1"]
ENDS_OF_GROUPS = [3, 4, 7, 8, 11, 12, 15, 16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accumulating_runs")
    write_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An undisturbed run."""
    run_training(folder, folder / "whole", *GROUP)
    return folder / "whole"


def progress_of(checkpoint: Path) -> Any:
    return json.loads((checkpoint / "checkpoint.json").read_text())["progress"]


def test_checkpoints_fall_where_a_dense_step_has_just_been_made(whole: Path) -> None:
    steps = {progress_of(path)["steps"] for path in folders_by_age(whole / "checkpoints")}
    assert len(steps) > 3 and steps <= set(ENDS_OF_GROUPS)


def test_the_norm_of_gradients_is_told_only_of_whole_groups(whole: Path) -> None:
    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/gradient_norm")] == ENDS_OF_GROUPS
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 17))


def test_sigterm_within_a_group_is_obeyed_at_its_end_and_the_run_goes_on_to_the_same_bits(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        first = StepsSeen(patch, 5)
        with pytest.raises(TrainingStopped):
            run_training(folder, tmp_path / "run", *GROUP)
    assert first.steps[-1][0] in ENDS_OF_GROUPS and len(first.steps) < 16
    with monkeypatch.context() as patch:
        second = StepsSeen(patch)
        run_training(folder, tmp_path / "run", *GROUP)
    assert [number for number, _ in first.steps + second.steps] == list(range(1, 17))
    assert_same_end(tmp_path / "run", whole)
