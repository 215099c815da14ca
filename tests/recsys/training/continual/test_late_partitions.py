"""Partitions that arrive late, lie in the future or have no date are named, and none is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

from recsys.checkpoint.partitions import ContinualFolder
from recsys.cli import main
from tests.recsys.training.continual.test_followed_walks import names_of, wait_for, words_of
from tests.recsys.training.continual.test_scores_first import assert_predicted_alike
from tests.recsys.training.continual.walk_runs import (
    NAMES,
    WITHOUT_CONTENT,
    lines_of,
    walk,
    write_partition,
)

LATE, FUTURE = "date=2025-11-07", "date=2062-11-09"


def add(folder: Path, name: str) -> None:
    """Write the third partition under another name."""
    place = write_partition(folder / "data", 2)
    place.rename(place.with_name(name))


def test_a_run_of_before_ignores_what_lies_before_its_first_partition(two: Path) -> None:
    file = two / "run" / "continual.json"
    stored = json.loads(file.read_text())
    del stored["first"]
    file.write_text(json.dumps(stored))
    add(two, LATE)
    walk(two, two / "run", *WITHOUT_CONTENT)
    assert names_of(two / "run") == NAMES[:2]


def test_a_late_partition_is_trained_on_without_scores_where_that_is_asked(two: Path) -> None:
    """The next one is scored by the model that knows it, and counts its items."""
    add(two, LATE)
    words = [*WITHOUT_CONTENT, "--continual.late", "train"]
    walk(two, two / "run", *words)
    assert names_of(two / "run") == [*NAMES[:2], LATE]
    assert [line["partition"] for line in lines_of(two / "run")] == [NAMES[1]]
    write_partition(two / "data", 3)
    walk(two, two / "run", *words)
    assert names_of(two / "run") == [*NAMES[:2], LATE, NAMES[3]]
    line = lines_of(two / "run")[-1]
    assert (line["partition"], line["model_of"]) == (NAMES[3], LATE)
    folder = ContinualFolder(two / "run")
    shutil.copytree(folder.run_of(LATE), folder.run_of(NAMES[2]))  # the name of the day before
    assert_predicted_alike(two, 3, two / "predicted.parquet", line)


def test_a_partition_that_would_block_all_later_ones_is_named_behind_the_others(two: Path) -> None:
    add(two, FUTURE)
    write_partition(two / "data", 2)
    with pytest.raises(ValueError, match=rf"train/{FUTURE}: .*rename or remove it"):
        walk(two, two / "run", *WITHOUT_CONTENT)
    assert names_of(two / "run") == NAMES[:3]
    write_partition(two / "data", 3)
    with pytest.raises(ValueError, match=rf"train/{FUTURE}"):
        walk(two, two / "run", *WITHOUT_CONTENT)
    assert names_of(two / "run") == NAMES[:4]
    walk(two, two / "run", *WITHOUT_CONTENT, last="2025-11-30")  # what lies behind is not asked for


def test_a_walk_that_follows_names_it_and_goes_on_with_others(
    two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(two, FUTURE)

    def write() -> None:
        write_partition(two / "data", 2)
        wait_for(two / "run", 3)
        os.kill(os.getpid(), signal.SIGTERM)

    writer = threading.Timer(2.0, write)
    writer.start()
    assert main(words_of(two, "--follow", "--continual.poll_seconds", "0.1")) == 0
    writer.join()
    assert names_of(two / "run") == NAMES[:3]
    printed = capsys.readouterr().out
    assert f"train/{FUTURE}: lies" in printed and "days in the future" in printed


def test_a_late_partition_ends_a_walk_that_follows_with_its_name(
    two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(two, LATE)
    assert main(words_of(two, "--follow", "--continual.poll_seconds", "0.1")) == 1
    assert f"train/{LATE}: is older than" in capsys.readouterr().err
