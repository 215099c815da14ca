"""Walks that wait for partitions, of several ranks that are killed, and that export packages."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from recsys.checkpoint.partitions import ContinualFolder, RunState, TrainedPartition
from recsys.cli import main
from recsys.config import ContinualSettings
from recsys.serving.delta import apply_delta
from recsys.serving.package import Manifest, write_manifest
from recsys.training.continual import walk as walk_module
from tests.ranks import HANG_SECONDS
from tests.recsys.command_runs import TINY, program
from tests.recsys.training.continual.kill_walks import survive
from tests.recsys.training.continual.walk_runs import (
    ARGV,
    NAMES,
    WITHOUT_CONTENT,
    files_of,
    lines_of,
    walk,
    write_partition,
    write_walk,
)


def arguments_of(folder: Path, *extra: str) -> list[str]:
    argv = ["continual", "--config", str(TINY), "--data", str(folder / "data")]
    return [*argv, "--out", str(folder / "run"), *ARGV, *WITHOUT_CONTENT, *extra]


def names_of(run: Path) -> list[str]:
    return [trained.name for trained in ContinualFolder(run).read().trained]


def wait_for(run: Path, count: int) -> None:
    while len(names_of(run)) < count:
        time.sleep(0.05)


def test_a_walk_follows_partitions_until_it_is_asked_to_end(tmp_path: Path) -> None:
    write_walk(tmp_path / "data", 1)
    run = tmp_path / "run"
    recorded: list[list[str]] = []

    def write() -> None:
        wait_for(run, 1)
        partition = write_partition(tmp_path / "data", 1, is_complete=False)
        time.sleep(0.5)
        recorded.append(names_of(run))
        (partition / "_SUCCESS").touch()
        wait_for(run, 2)
        os.kill(os.getpid(), signal.SIGTERM)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    assert main(arguments_of(tmp_path, "--follow", "--continual.poll_seconds", "0.1")) == 0
    writer.join()
    assert recorded == [NAMES[:1]]  # it has waited for the mark
    assert names_of(run) == NAMES[:2]
    # With a last partition it ends by itself.
    assert main(arguments_of(tmp_path, "--follow", "--until", "2025-11-09")) == 0


@pytest.mark.long
def test_ranks_of_torchrun_follow_partitions_and_end_on_its_sigterm(tmp_path: Path) -> None:
    """SIGTERM comes once between partitions, and once while one is trained on."""
    write_walk(tmp_path / "data", 1)
    run = tmp_path / "run"
    argv = arguments_of(tmp_path, "--follow", "--continual.poll_seconds", "0.1")
    argv = ["--standalone", "--nproc-per-node", "2", "-m", "--", "recsys.cli", *argv]
    for number in (1, 2):
        with (tmp_path / "log").open("w") as log:
            followed = subprocess.Popen(**program("torchrun", *argv), stdout=log, stderr=log)
            wait_until(lambda: "waiting for" in (tmp_path / "log").read_text(), followed)
            write_partition(tmp_path / "data", number)
            scores = ContinualFolder(run).scores_of(NAMES[number])
            wait_until(scores.exists, followed)
            if number == 1:
                wait_until(lambda: len(names_of(run)) == 2, followed)
            followed.send_signal(signal.SIGTERM)
            followed.wait(HANG_SECONDS)
        assert f"asked to end; {run} " in (tmp_path / "log").read_text()
        assert names_of(run)[:2] == NAMES[:2]
    assert main([*arguments_of(tmp_path), "--until", "2025-11-10"]) == 0
    assert names_of(run) == NAMES[:3]
    assert [line["partition"] for line in lines_of(run)] == NAMES[1:3]


def wait_until(happens: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + HANG_SECONDS
    while not happens():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.long
def test_a_walk_survives_kills_with_the_same_bits(tmp_path: Path) -> None:
    survive(tmp_path, kills=3, seed=1)


def with_packages(folder: Path) -> list[str]:
    return [*WITHOUT_CONTENT, "--continual.packages", str(folder)]


@pytest.mark.long
def test_a_package_and_its_deltas_are_the_newest_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_walk(tmp_path / "data", 3)
    out, argv = tmp_path / "packages", with_packages(tmp_path / "packages")
    walk(tmp_path, tmp_path / "run", *argv, last="2025-11-09")
    assert sorted(files.name for files in out.iterdir()) == [
        *NAMES[:2],
        f"{NAMES[1]}.delta",
        "newest",
    ]
    calls = apply_delta(out / NAMES[0], out / f"{NAMES[1]}.delta", tmp_path / "made")
    assert calls.files and files_of(tmp_path / "made") == files_of(out / NAMES[1])
    assert (out / "newest").resolve() == (out / NAMES[1]).resolve()

    with monkeypatch.context() as failing:
        failing.setattr(walk_module, "_export", lambda *_: 1 / 0)  # as if it was killed
        with pytest.raises(ZeroDivisionError):
            walk(tmp_path, tmp_path / "run", *argv)
    walk(tmp_path, tmp_path / "run", *argv)  # nothing is left to train on
    assert sorted(trained.name for trained in out.iterdir() if trained.is_dir()) == [
        *NAMES[1:3],
        "newest",
    ]
    delta = apply_delta(tmp_path / "made", out / f"{NAMES[2]}.delta", tmp_path / "later")
    assert delta.files and files_of(tmp_path / "later") == files_of(out / NAMES[2])


def test_what_a_killed_job_left_of_a_delta_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk_module, "_export", lambda run, package, tables: package.mkdir())
    monkeypatch.setattr(walk_module, "write_delta", lambda *_: None)
    (tmp_path / NAMES[0]).mkdir()
    (tmp_path / f".{NAMES[1]}.delta.0.partial").touch()
    state = RunState(tuple(TrainedPartition(name, 1, "") for name in NAMES[:2]))
    settings = ContinualSettings(packages=str(tmp_path))
    walk_module.export_newest(settings, ContinualFolder(tmp_path / "run"), state)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [*NAMES[:2], "newest"]


def test_items_with_a_bounded_vocabulary_have_no_package(tmp_path: Path) -> None:
    write_walk(tmp_path / "data", 1, bounded_items=True)
    with pytest.raises(ValueError, match=r"continual\.packages.*'item'.*bounded"):
        walk(tmp_path, tmp_path / "run", *with_packages(tmp_path / "packages"))
    assert not (tmp_path / "run" / "continual.json").exists()


def test_a_package_of_another_model_is_not_taken_for_that_of_the_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk_module, "model_of", lambda _: "own")
    monkeypatch.setattr(walk_module, "_export", lambda *_: None)
    settings, folder = ContinualSettings(packages=str(tmp_path)), ContinualFolder(tmp_path / "run")
    state = RunState((TrainedPartition(NAMES[0], 1, ""),))
    stale = tmp_path / f"{NAMES[0]}.delta"
    stale.touch()
    walk_module.export_newest(settings, folder, state)
    assert not stale.exists()
    (tmp_path / "newest").unlink()

    columns = ["liked"], [], [], [], "item", None, {}, {}
    (tmp_path / NAMES[0]).mkdir()
    manifest = Manifest("run", "din", *columns, searches=False, bounded=[], model="other")
    write_manifest(tmp_path / NAMES[0], manifest)
    with pytest.raises(ValueError, match=f"{NAMES[0]}: is of another model than .*/run"):
        walk_module.export_newest(settings, folder, state)
    assert not (tmp_path / "newest").is_symlink()
