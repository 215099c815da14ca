"""Wherever a start is cut off, the same command goes on or starts anew, with the same result.

Wherever a job writes, another on the same folder is refused.
"""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recsys.checkpoint.run_folder import JOB, find_start, trained_counts
from recsys.checkpoint.warm_start.source import WarmStart
from recsys.distributed.lockstep import TrainingStopped
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.training.train import train
from recsys.training.trainer import LossWatch, Trainer
from tests.datasets import write_dataset
from tests.recsys.checkpoint.folder_changes import CHANGES, ENDED, Killed
from tests.recsys.checkpoint.stopped_runs import StepsSeen, config_of

# 4 steps with two validations, and no periodic checkpoint.
SETTINGS = ["--content", "none", "--embedding.skip", "[]", "--batch_size", "16", "--epochs", "1"]
SETTINGS += ["--checkpoint.every_steps", "99", "--validations_per_epoch", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starts")
    write_dataset(folder / "data")
    return folder


def run_training(folder: Path, run: Path, **arguments: Any) -> dict[str, Any]:
    with joined_ranks("cpu") as ranks:
        return train_on(ranks, folder, run, **arguments)


def train_on(ranks: Ranks, folder: Path, run: Path, **arguments: Any) -> dict[str, Any]:
    return train(config_of(folder, *SETTINGS), str(folder / "data"), run, ranks, **arguments)


@pytest.fixture(scope="module")
def full_run(folder: Path) -> tuple[Path, list[str]]:
    """An undisturbed run, and what it changed in its folder, in order."""
    with pytest.MonkeyPatch.context() as patch, CHANGES.watched(folder / "whole") as changes:
        patch.setenv("TORCHELASTIC_RUN_ID", "shop1")
        run_training(folder, folder / "whole")
    return folder / "whole", changes


def without_speed(metrics: dict[str, Any]) -> dict[str, Any]:
    return {**metrics, "train": metrics["train"]["steps"]}


def result(run: Path) -> dict[str, Any]:
    return without_speed(json.loads((run / "metrics.json").read_text()))


def start(folder: Path, run: Path, **arguments: Any) -> bool:
    """Whether the command gets as far as its first step; it then ends."""
    with pytest.MonkeyPatch.context() as patch:

        def stop(_: Trainer) -> None:
            raise TrainingStopped

        patch.setattr(Trainer, "train", stop)
        with pytest.raises(TrainingStopped, match="after step"):
            run_training(folder, run, **arguments)
    return True


def sampled(changes: list[str], count: int) -> list[int]:
    """Places spread over all changes, the first and last among them."""
    return sorted({round(index * (len(changes) - 1) / (count - 1)) for index in range(count)})


def test_a_start_cut_off_at_any_change_of_its_folder_can_be_repeated(
    folder: Path, full_run: tuple[Path, list[str]], tmp_path: Path
) -> None:
    _, changes = full_run
    assert len(changes) > 20
    for index in sampled(changes, 5):
        with pytest.raises(ENDED), CHANGES.watched(tmp_path / str(index), kill_index=index):
            run_training(folder, tmp_path / str(index))
        assert start(folder, tmp_path / str(index)), changes[index]


def test_a_replacement_cut_off_at_any_change_leaves_a_folder_that_can_be_begun(
    folder: Path, full_run: tuple[Path, list[str]], tmp_path: Path
) -> None:
    shutil.copytree(full_run[0], tmp_path / "seen")
    with CHANGES.watched(tmp_path / "seen") as changes:
        start(folder, tmp_path / "seen", overwrite=True)
    assert len(changes) > 10
    for index in sampled(changes, 4):
        run = tmp_path / str(index)
        shutil.copytree(full_run[0], run)
        with pytest.raises(ENDED), CHANGES.watched(run, kill_index=index):
            start(folder, run, overwrite=True)
        assert start(folder, run), changes[index]


def test_a_run_that_replaces_another_has_none_of_its_results_and_counts(
    folder: Path, full_run: tuple[Path, list[str]], tmp_path: Path
) -> None:
    start(folder, tmp_path / "run", warm_start=WarmStart(full_run[0]))
    assert trained_counts(tmp_path / "run", 30).counts.sum() == 2 * 60
    results = [tmp_path / "run" / name for name in ("evaluation_test.json", "scores_test.parquet")]
    for file in results:
        file.touch()
    start(folder, tmp_path / "run", overwrite=True)
    assert trained_counts(tmp_path / "run", 30).counts.sum() == 60
    assert not any(file.exists() for file in results)


def test_killed_after_the_first_validation_a_run_goes_on_with_the_same_end(
    folder: Path, full_run: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LossWatch.step

    def step(watch: LossWatch, number: int, loss: Any, positions: Any) -> Any:
        if number == 3:
            raise Killed
        return original(watch, number, loss, positions)

    with monkeypatch.context() as patch:
        patch.setattr(LossWatch, "step", step)
        with pytest.raises(Killed):
            run_training(folder, tmp_path / "run")
    with monkeypatch.context() as patch:
        steps_seen = StepsSeen(patch)
        run_training(folder, tmp_path / "run")
    assert [number for number, _ in steps_seen.steps] == [3, 4]
    assert result(tmp_path / "run") == result(full_run[0])


def test_a_signal_before_the_first_step_ends_the_start_and_leaves_no_lock(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train", lambda _, number=number: signal.raise_signal(number))
            with pytest.raises(KeyboardInterrupt):
                run_training(folder, tmp_path / "run")
        assert start(folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("environment", "finished", "is_resumed"),
    [
        ({}, True, False),
        ({"TORCHELASTIC_RUN_ID": "shop1"}, True, False),
        ({"TORCHELASTIC_RUN_ID": "shop1"}, False, True),
        ({"TORCHELASTIC_RUN_ID": "shop1", "TORCHELASTIC_RESTART_COUNT": "1"}, True, True),
        ({"TORCHELASTIC_RUN_ID": "shop2"}, False, False),
        # It was restarted before it had begun the run.
        ({"TORCHELASTIC_RUN_ID": "shop2", "TORCHELASTIC_RESTART_COUNT": "1"}, False, False),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}, False, False),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False, False),
    ],
)
def test_overwrite_and_never_count_for_all_but_the_restarts_of_the_job_that_began_the_run(
    full_run: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    finished: bool,
    is_resumed: bool,
) -> None:
    """The run was begun, and ended well, by a job named shop1."""
    run = tmp_path / "run"
    shutil.copytree(full_run[0], run)
    if not finished:
        (run / JOB).write_text((run / JOB).read_text().replace("true", "false"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with joined_ranks("cpu") as ranks:
        assert find_start(run, "auto", True, ranks) is is_resumed
        if is_resumed:
            assert find_start(run, "never", False, ranks)
        else:
            with pytest.raises(ValueError, match="--overwrite"):
                find_start(run, "never", False, ranks)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
        ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
    ],
)
def test_a_restart_goes_on_with_the_run_it_has_begun_by_whatever_launcher(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: str
) -> None:
    monkeypatch.setenv(name, "none")  # as torchrun names a job that was given no name
    with pytest.MonkeyPatch.context() as patch:
        StepsSeen(patch, stop_after=1)
        with pytest.raises(TrainingStopped):
            run_training(folder, tmp_path / "run", overwrite=True)
    monkeypatch.setenv(count, "1")
    with joined_ranks("cpu") as ranks:
        assert find_start(tmp_path / "run", "auto", True, ranks)


def test_a_dataset_is_not_taken_for_the_folder_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match=f"{tmp_path}: .*dataset"):
        find_start(tmp_path, "auto", True, ranks)


def refused_at_each(action: Callable[[], object], path: Path) -> Callable[[str], None]:
    """Try another job at every tenth change; the error must name the job at work."""
    tried: list[str] = []

    def at_change(change: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # the other job would have collectives of its own
        tried.append(change)
        if len(tried) % 10 == 1:
            with pytest.raises(ValueError, match=f"{path}: .*process {os.getpid()} on "):
                action()

    return at_change


def test_no_second_job_comes_into_a_run_wherever_the_first_is(
    folder: Path, full_run: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(full_run[0], run)
    with joined_ranks("cpu") as ranks:
        again = refused_at_each(lambda: train_on(ranks, folder, run, overwrite=True), run)
        with CHANGES.watched(run, at_change=again) as changes:
            train_on(ranks, folder, run, overwrite=True)
    assert len(changes) > 20
    assert result(run) == result(full_run[0])
    assert not list(run.glob(".lock*"))
