"""Trials are neither lost nor repeated, and what they try does not depend on interruptions."""

import copy
import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from optuna.trial import TrialState

from recsys.commands.training import _print_best_trials
from recsys.config import Config, load_config
from recsys.search.search import BEST, Search, SearchStopped, dataset_digest
from recsys.search.space import Parameter, read_space
from recsys.search.validations import ValidationLines, read_lines
from recsys.storage.location import Location
from tests.datasets import write_dataset
from tests.recsys.search import fake_training

PROJECT = Path(__file__).parents[3]
TINY = PROJECT / "recsys" / "recipes" / "tiny.yaml"
SPACE = "optimizer.learning_rate: {low: 1.0e-4, high: 0.08}\n"


@functools.cache
def recipe() -> Config:
    return load_config(TINY, ["--content", "none"])


def config_and_space(folder: Path, space: str = SPACE) -> tuple[Config, list[Parameter]]:
    """The recipe and the space of a search; its dataset is written."""
    if not (folder / "data").exists():
        write_dataset(folder / "data")
    (folder / "space.yaml").write_text(space)
    return copy.deepcopy(recipe()), read_space(folder / "space.yaml")


def search_in(folder: Path, trials: int, space: str = SPACE, **options: Any) -> Search:
    """A search with the fake training on the dataset in `folder`."""
    config, read = config_and_space(folder, space)
    data = [str(folder / "data")]
    return Search(config, read, data, folder / "search", trials, **options)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_training(monkeypatch.setattr)


def use_fake_training(setattr: Any = setattr) -> None:
    def command(search: Search, run: Path, data: str) -> list[str]:
        # It needs no package: looking for them would take most of its time.
        return [sys.executable, "-S", fake_training.__file__, "train", "--out", str(run)]

    setattr(Search, "_command", command)


def tried(search: Search) -> list[tuple[int, str, dict[str, Any], list[float] | None]]:
    return [
        (trial.number, trial.state.name, trial.params, trial.values) for trial in search.trials()
    ]


def starts(search: Search) -> list[int]:
    """How often the training of each trial was started."""
    files = sorted((search.out / "trials").glob("*/run-0/starts.txt"))
    return [len(file.read_text().splitlines()) for file in files]


def test_the_best_of_the_trials_is_written_as_a_configuration(tmp_path: Path) -> None:
    search = search_in(tmp_path, 4, prunes=False)
    best = search.run()[0]

    rates = [trial.params["optimizer.learning_rate"] for trial in search.trials()]
    assert best.params == {"optimizer.learning_rate": min(rates)} and len(set(rates)) == 4
    expected = copy.deepcopy(recipe())
    expected.optimizer.learning_rate = min(rates)
    assert load_config(tmp_path / "search" / BEST) == expected
    assert starts(search) == [1, 1, 1, 1]


@pytest.mark.long
def test_a_longer_search_goes_on_with_the_same_trials(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    full, split = search_in(tmp_path, 5), tmp_path / "two"
    full.run()
    for trials in (2, 3, 5):
        later = search_in(split, trials)
        later.run()

    assert tried(later) == tried(full) and starts(later) == [1] * 5
    best = split / "search" / BEST
    expected = best.read_text()
    best.write_text("stale")  # of a search that was killed after a trial's end
    later.run()
    assert best.read_text() == expected


def _hold_and_search(folder: str) -> None:
    """Run a search that waits in its second trial, in a process of its own."""
    use_fake_training()
    search_in(Path(folder), 4).run()


def test_a_killed_search_loses_and_repeats_no_trial(tmp_path: Path) -> None:
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    full, killed = search_in(tmp_path / "whole", 4), tmp_path / "killed"
    full.run()
    write_dataset(killed / "data")
    (killed / "hold-1").touch()

    process = multiprocessing.get_context("spawn").Process(
        target=_hold_and_search, args=(str(killed),)
    )
    process.start()
    waited_for(killed / "search" / "trials" / "0001" / "run-0" / "starts.txt")
    (orphan,) = psutil.Process(process.pid).children()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    orphan.kill()
    orphan.wait()
    (killed / "hold-1").unlink()

    resumed = search_in(killed, 4)
    states = [trial.state for trial in resumed.trials()]
    assert states == [TrialState.COMPLETE, TrialState.RUNNING]
    resumed.run()
    assert tried(resumed) == tried(full)
    assert starts(resumed) == [1, 2, 1, 1]  # the second goes on in the folder that it has


def waited_for(file: Path) -> None:
    """Wait until a file exists."""
    deadline = time.monotonic() + 240
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} does not appear"
        time.sleep(0.02)


def test_a_search_that_is_asked_to_end_ends_its_training_and_goes_on_later(tmp_path: Path) -> None:
    search = search_in(tmp_path, 2)
    (tmp_path / "hold-0").touch()
    started = tmp_path / "search" / "trials" / "0000" / "run-0" / "starts.txt"

    def ask(*_: Any) -> None:
        waited_for(started)
        signal.raise_signal(signal.SIGTERM)

    old_handler = signal.signal(signal.SIGALRM, ask)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(SearchStopped):
        search.run()
    signal.signal(signal.SIGALRM, old_handler)
    assert not [one for one in psutil.Process().children() if "--out" in one.cmdline()]

    (tmp_path / "hold-0").unlink()
    search_in(tmp_path, 2).run()
    assert starts(search) == [2, 1]


def test_two_jobs_share_the_trials(tmp_path: Path) -> None:
    search = search_in(tmp_path, 6, jobs=2, prunes=False)
    search.run()
    assert [state for _, state, *_ in tried(search)] == ["COMPLETE"] * 6
    assert starts(search) == [1] * 6


def test_trials_worse_than_the_median_are_pruned(tmp_path: Path) -> None:
    search = search_in(tmp_path, 9)
    search.run()

    states = [trial.state for trial in search.trials()]
    assert states[:5] == [TrialState.COMPLETE] * 5  # a median needs five
    for trial in search.trials(TrialState.PRUNED):
        earlier = [other for other in search.ranking() if other.number < trial.number]
        at_last = [other.intermediate_values[trial.last_step or 0] for other in earlier]
        assert max(trial.intermediate_values.values()) < sorted(at_last)[len(at_last) // 2]
    assert TrialState.PRUNED in states


def test_a_grid_is_tried_as_a_whole_and_no_further(tmp_path: Path) -> None:
    space = "optimizer.learning_rate: {choices: [0.01, 0.02, 0.03]}\n"
    search = search_in(tmp_path, 9, space, sampler="grid")
    search.run()

    rates = [params["optimizer.learning_rate"] for _, _, params, _ in tried(search)]
    assert rates == ["0.01", "0.02", "0.03"]


def test_runs_of_a_trial_begin_with_the_seed_that_it_tries(tmp_path: Path) -> None:
    space = "optimizer.learning_rate: {choices: [0.01]}\nseed: {choices: [5]}\n"
    search = search_in(tmp_path, 1, space, seeds=2)
    search.run()
    runs = sorted((search.out / "trials").glob("*/run-*/starts.txt"))
    assert [run.read_text() for run in runs] == ["seed 5\n", "seed 6\n"]


def test_equal_values_are_trained_once(tmp_path: Path) -> None:
    search = search_in(tmp_path, 3, "optimizer.learning_rate: {choices: [0.01]}\n")
    search.run()
    assert [values for *_, values in tried(search)] == [tried(search)[0][3]] * 3
    assert starts(search) == [1]


def test_a_trial_that_fails_is_recorded_and_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    space = "optimizer.learning_rate: {choices: [0.01, 0.095, 0.02]}\n"
    search = search_in(tmp_path, 3, space, sampler="grid")
    search.run()

    assert [state for _, state, *_ in tried(search)] == ["COMPLETE", "FAIL", "COMPLETE"]
    log = tmp_path / "search" / "trials" / "0001" / "log.txt"
    assert any(str(log) in line for line in caplog.messages)
    assert "not finite" in log.read_text()


@pytest.mark.parametrize(("trials", "jobs"), [(9, 1), (9, 2), (2, 1)])
def test_a_search_whose_first_trials_all_fail_ends(tmp_path: Path, trials: int, jobs: int) -> None:
    space = "optimizer.learning_rate: {low: 0.091, high: 0.099}\n"
    with pytest.raises(ValueError, match=r"first [234] trials .*log\.txt"):
        search_in(tmp_path, trials, space, jobs=jobs).run()


def test_a_search_without_a_complete_trial_fails_each_time(tmp_path: Path) -> None:
    for message in ("first 1 trials failed", "no trial is complete"):
        with pytest.raises(ValueError, match=message):
            search_in(tmp_path, 1, "optimizer.learning_rate: {choices: [0.095]}\n").run()


def test_errors_of_trials_are_shown_without_the_sign_by_which_they_are_ordered(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trial = SimpleNamespace(number=0, values=[-0.25], params={})
    study: Any = SimpleNamespace(space=[], config=Config(best_model_by="rmse"), out=Path("search"))
    study.data, study.ranking = ["data"], lambda: [trial]
    _print_best_trials(study)
    assert "0      0.2500" in capsys.readouterr().out


def test_a_search_with_other_settings_or_data_in_the_folder_is_refused(tmp_path: Path) -> None:
    search_in(tmp_path, 1)
    for changes, message in (
        ({"space": "optimizer.learning_rate: {low: 1.0e-4, high: 0.07}\n"}, "0.08.*0.07"),
        ({"seeds": 2}, "--seeds: 1, now 2"),
    ):
        with pytest.raises(ValueError, match=message):
            search_in(tmp_path, 1, **changes)

    _, space = config_and_space(tmp_path)
    other = load_config(TINY, ["--content", "none", "--epochs", "7"])
    data = [str(tmp_path / "data")]
    with pytest.raises(ValueError, match="epochs: 1, now 7"):
        Search(other, space, data, tmp_path / "search", 1)

    write_dataset(tmp_path / "data", seed=1)
    with pytest.raises(ValueError, match=f"content of {tmp_path / 'data'}"):
        search_in(tmp_path, 1)


def test_an_invalid_space_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    space = "ranking.cross_rank: {low: -1, high: 3}\n"
    with pytest.raises(ValueError, match=r"'ranking.cross_rank' -1"):
        search_in(tmp_path, 1, space)
    assert not (tmp_path / "search").exists()
    (tmp_path / "search").mkdir()
    with pytest.raises(ValueError, match=r"'ranking.cross_rank' -1"):
        search_in(tmp_path, 1, space)
    assert not list((tmp_path / "search").iterdir())


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    config, space = config_and_space(tmp_path)
    data, other = tmp_path / "data", tmp_path / "notes"
    other.mkdir()
    (other / "plan.md").touch()
    for out, message in ((data, "data: is part of"), (other, "notes: holds 'plan.md'")):
        old_names = sorted(path.name for path in out.iterdir())
        with pytest.raises(ValueError, match=message):
            Search(config, space, [str(data)], out, 1)
        assert old_names == sorted(path.name for path in out.iterdir() if path.name != ".lock")


def test_other_fits_of_transforms_are_another_dataset(tmp_path: Path) -> None:
    data, digests = write_dataset(tmp_path / "data"), set()
    for mean in (None, 0.0, 1.0):
        if mean is not None:
            (data / "transforms.yaml").write_text(f"price: {{mean: {mean}}}\n")
        digests.add(dataset_digest(Location.of(data)))
    assert len(digests) == 3


def test_a_changed_file_of_features_is_another_dataset(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    schema = data / "schema.yaml"
    schema.write_text(f"{schema.read_text()}    sound: {{kind: feature, file: sound.npy}}\n")
    digests = []
    for value in (0.0, 1.0):
        np.save(data / "sound.npy", np.full((30, 2), value, np.float32))
        digests.append(dataset_digest(Location.of(data)))
    assert digests[0] != digests[1]


def run_lines(folder: Path, first_step: int, steps: Sequence[int]) -> list[int]:
    tracker = ValidationLines(folder, {}, first_step)
    for step in steps:
        tracker.log({"train/loss": 0.5}, step)
        tracker.log({"valid/auc": 0.5 + step / 100, "valid/recall_at_10": 0.1}, step)
        tracker.log({"valid/liked/auc": 0.1}, step)
    tracker.close()
    return [line["step"] for line in read_lines(folder)]


def test_validations_are_lines_and_those_that_are_made_again_appear_once(tmp_path: Path) -> None:
    assert run_lines(tmp_path, 0, [10, 20, 30]) == [10, 20, 30]
    assert read_lines(tmp_path)[0] == {
        "step": 10,
        "metrics": {"auc": 0.6, "recall_at_10": 0.1},
    }
    assert run_lines(tmp_path, 20, [20, 30]) == [10, 20, 30]
    with (tmp_path / "validations.jsonl").open("a") as file:
        file.write('{"step": 40, "met')
    assert [line["step"] for line in read_lines(tmp_path)] == [10, 20, 30]
