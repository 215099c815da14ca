"""A run goes on where it stopped: from the last whole checkpoint, or not at all."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from recsys.checkpoint.files import folders_by_age
from recsys.distributed.lockstep import TrainingStopped
from recsys.distributed.ranks import joined_ranks
from recsys.training.train import train
from recsys.training.trainer import LossWatch
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.checkpoint.kill_ranks import tensors
from tests.recsys.checkpoint.stopped_runs import StepsSeen, assert_same_end, config_of, run_training
from tests.recsys.em3_runs import ranks_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume::a")
    write_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module")
def full_run(folder: Path) -> Path:
    """An undisturbed run on one rank."""
    run_training(folder, folder / "whole")
    return folder / "whole"


@pytest.mark.parametrize("stop_after", [5, pytest.param(8, marks=pytest.mark.long)])
def test_sigterm_loses_no_step_and_the_same_command_goes_on(
    folder: Path, full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    with monkeypatch.context() as patch:
        first = StepsSeen(patch, stop_after)
        with pytest.raises(TrainingStopped, match=r"/checkpoints/step-0+\d+"):
            run_training(folder, tmp_path / "run")
    with monkeypatch.context() as patch:
        second = StepsSeen(patch)
        run_training(folder, tmp_path / "run")
    assert [number for number, _ in first.steps + second.steps] == list(range(1, 17))
    assert len(first.steps) < 16
    for steps in ((first.steps + second.steps)[:8], (first.steps + second.steps)[8:]):
        counts = Counter(row for _, rows in steps for row in rows)
        assert Counter({row: counts[row] for row in range(60)}) == Counter(range(60))
    assert_same_end(tmp_path / "run", full_run)


@pytest.mark.parametrize(("first_n", "next_n"), [(4, 1), (1, 8)])
def test_an_epoch_is_read_to_its_end_with_another_number_of_validations(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_n: int, next_n: int
) -> None:
    argv = [["--validations_per_epoch", str(count), "--epochs", "1"] for count in (first_n, next_n)]
    with monkeypatch.context() as patch:
        first = StepsSeen(patch, 5)
        with pytest.raises(TrainingStopped):
            run_training(folder, tmp_path / "run", *argv[0])
    with monkeypatch.context() as patch:
        second, validations = StepsSeen(patch), list[int]()
        patch.setattr(
            "recsys.training.trainer.Reporter.validation",
            lambda _, progress, report: validations.append(progress.steps),
        )
        run_training(folder, tmp_path / "run", *argv[1])
    counts = Counter(row for _, rows in first.steps + second.steps for row in rows)
    assert Counter({row: counts[row] for row in range(60)}) == Counter(range(60))
    assert validations == sorted(set(validations)) and validations[-1] == 8


@pytest.mark.parametrize(("first_n", "next_n"), [(8, 16), (16, 8)])
def test_decay_ends_with_the_last_epoch_also_where_another_batch_size_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_n: int, next_n: int
) -> None:
    schedule = ["--optimizer.schedule", "linear", "--optimizer.warmup_steps", "0"]
    argv = [["--batch_size", str(size), "--epochs", "2", *schedule] for size in (first_n, next_n)]
    with monkeypatch.context() as patch:
        first = StepsSeen(patch, 3)
        with pytest.raises(TrainingStopped):
            run_training(folder, tmp_path / "run", *argv[0])
    rates: list[float] = []  # after each step
    monkeypatch.setattr(
        "recsys.training.trainer.Reporter.step",
        lambda reporter, *_: rates.append(reporter.job.dense_optimizer.param_groups[0]["lr"]),
    )
    run_training(folder, tmp_path / "run", *argv[1])
    full_rate = config_of(folder).optimizer.encoder_learning_rate
    planned = len(first.steps) + len(rates)
    expected = [full_rate * steps / planned for steps in reversed(range(len(rates)))]
    assert rates == pytest.approx(expected)


def test_a_map_that_learns_ids_goes_on_with_the_rows_it_has_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_dataset(tmp_path / "data", num_users=20)
    schema = data / "schema.yaml"
    bounded = "num_embeddings: 6, vocabulary: {kind: bounded, admit_after: 2}"
    schema.write_text(schema.read_text().replace("num_embeddings: 20", bounded))
    config = config_of(tmp_path, "--content", "none", "--embedding.skip", "[]")
    metrics = []
    for name, stop_after in (("whole", None), ("stopped", 6), ("stopped", None)):
        with monkeypatch.context() as patch, joined_ranks("cpu") as ranks:
            StepsSeen(patch, stop_after)
            try:
                metrics.append(train(config, str(data), tmp_path / name, ranks))
            except TrainingStopped:
                assert stop_after is not None
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")
    assert "vocabulary.user.ids" in tensors(tmp_path / "whole" / "checkpoints" / "best")
    counted = [result["train"]["vocabularies"]["user"] for result in metrics]
    assert counted[0] == counted[1] and min(counted[0].values()) > 0
    assert metrics[0]["train"]["ids"] == metrics[1]["train"]["ids"]
    assert metrics[0]["train"]["ids"]["user"]["ids"] == 120
    assert 0 < metrics[0]["train"]["ids"]["user"]["unknown"] < 120


def test_outputs_of_encoders_go_on_as_they_were(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--content.encoder_share", "0.3"]
    run_training(folder, tmp_path / "whole", *argv)
    with monkeypatch.context() as patch:
        StepsSeen(patch, 5)
        with pytest.raises(TrainingStopped):
            run_training(folder, tmp_path / "run", *argv)
    run_training(folder, tmp_path / "run", *argv)
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    assert "encoder_outputs" in tensors(tmp_path / "whole" / "checkpoints" / "best")


def unfinished(run: Path, full_run: Path) -> list[Path]:
    """A copy of a run without its end; its checkpoints, the newest first."""
    shutil.copytree(full_run, run)
    (run / "metrics.json").unlink()
    return folders_by_age(run / "checkpoints")


def test_where_every_checkpoint_is_damaged_nothing_starts_from_the_beginning(
    folder: Path, full_run: Path, tmp_path: Path
) -> None:
    for checkpoint in unfinished(tmp_path / "run", full_run):
        (checkpoint / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoints: .*--overwrite"):
        run_training(folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--embedding.dim", "8"], r"embedding.dim \(checkpoint: 16, now: 8\)"),
        (["--seed", "4"], r"seed \(checkpoint: 0, now: 4\)"),
        (["--content", "none"], r"content.dim"),
    ],
)
def test_a_configuration_that_cannot_go_on_is_refused_with_what_differs(
    folder: Path, full_run: Path, argv: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=f"{message}.*--out"):
        run_training(folder, full_run, *argv)


def test_other_training_data_are_refused(folder: Path, full_run: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": 61, "valid": 24, "test": 20})
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match="training data"):
        train(config_of(folder), str(tmp_path / "data"), full_run, ranks)


def test_a_loss_that_is_not_finite_ends_the_job_and_is_in_no_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LossWatch.step

    def step(watch: LossWatch, number: int, loss: Any, rows: Any) -> Any:
        return original(watch, number, loss * float("nan") if number == 6 else loss, rows)

    monkeypatch.setattr(LossWatch, "step", step)
    message = r"is nan .*step 6 .*rank 0, .* [78] .*/train/part-"
    with pytest.raises(ValueError, match=message + r".*/step-00000003"):
        run_training(folder, tmp_path / "run")
    assert [path.name for path in folders_by_age(tmp_path / "run" / "checkpoints")] == [
        "step-00000003"
    ]


def stop_or_go_on(rank: int, world_size: int, folder: Path, stop_after: int | None) -> Any:
    """Rank 0 alone is asked to end; positions of the steps this rank made."""
    with pytest.MonkeyPatch.context() as patch:
        steps_seen = StepsSeen(patch, stop_after if rank == 0 else None)
        config, run = config_of(folder, "--epochs", "1"), folder / "ranks"
        try:
            train(config, str(folder / "data"), run, ranks_of(rank, world_size))
        except TrainingStopped:
            assert stop_after is not None
        return [row for _, rows in steps_seen.steps for row in rows if row >= 0]


def test_an_epoch_begun_on_two_ranks_ends_on_three_with_every_impression_once(
    folder: Path,
) -> None:
    first = run_on_ranks(stop_or_go_on, 2, folder, 2)
    second = run_on_ranks(stop_or_go_on, 3, folder, None)
    assert [len(rows) for rows in first] == [first and len(first[0])] * 2
    assert 0 < sum(map(len, first)) < 60
    counts = Counter(row for rows in [*first, *second] for row in rows)
    assert counts == Counter(range(60))
    manifest = json.loads(
        (folders_by_age(folder / "ranks" / "checkpoints")[0] / "checkpoint.json").read_text()
    )
    assert (manifest["world_size"], manifest["progress"]["epoch"]) == (3, 1)
