"""Callbacks see every step, validation and end, and their errors end all ranks."""

from pathlib import Path

import pytest

from recsys.config import load_config
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import TINY, page_code
from tests.recsys.em3_runs import ranks_of

ARGV = ["--content", "none", "--contrastive.weight", "0", "--batch_size", "8", "--epochs", "2"]
ARGV += ["--device", "cpu", "--tracker", "[]", "--patience", "9"]
OWN_CALLBACKS = """
from recsys.training.callbacks import Callback

class Calls(Callback):
    lines = []
    def begin(self, job, progress):
        self.lines.append(f"begin {progress.steps}")
    def step(self, job, progress, losses):
        assert losses["loss"].isfinite()
        self.lines.append(f"step {progress.steps}")
    def validation(self, job, progress, report):
        self.lines.append(f"valid {progress.steps} {0 <= report['auc'] <= 1}")
    def end(self, job, progress):
        self.lines.append(f"end {progress.steps}")

class Fails(Callback):
    def step(self, job, progress, losses):
        if job.ranks.rank == 1 and progress.steps == 2:
            raise OSError("rank 1 has had enough")
"""


def train_with(rank: int, world_size: int, folder: Path, name: str) -> list[str]:
    """Train with a callback, and return its calls, or the error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import own_callbacks

        argv = [*ARGV, "--callbacks", f"['own_callbacks:{name}']"]
        try:
            config, ranks = load_config(TINY, argv), ranks_of(rank, world_size)
            train(config, str(folder / "data"), folder / f"run-{name}", ranks)
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]
        return list(own_callbacks.Calls.lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("callbacks")
    code = page_code("recsys/training/README.md", "LongestVector")
    (folder / "own_callbacks.py").write_text(f"{code}\n{OWN_CALLBACKS}")
    write_dataset(folder / "data", {"train": 32, "valid": 24, "test": 16})
    return folder


def test_a_callback_is_called_at_begin_steps_validations_and_end(folder: Path) -> None:
    for calls in run_on_ranks(train_with, 2, folder, "Calls"):
        steps = [*("step 1", "step 2"), "valid 2 True", *("step 3", "step 4"), "valid 4 True"]
        assert calls == ["begin 0", *steps, "end 4"]


def test_an_error_of_a_step_on_one_rank_ends_all(folder: Path) -> None:
    for (message,) in run_on_ranks(train_with, 2, folder, "Fails"):
        assert "rank 1 has had enough" in message


def test_what_is_no_callback_is_refused(folder: Path) -> None:
    (message,) = run_on_ranks(train_with, 1, folder, "OWN")[0]
    assert message.startswith("ValueError: callbacks 'own_callbacks:OWN' cannot be imported")


def test_the_callback_of_the_page_runs(folder: Path) -> None:
    assert run_on_ranks(train_with, 1, folder, "LongestVector") == [[]]
