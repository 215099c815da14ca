"""A walk that exports: packages, deltas between them, and the link to the newest."""

from __future__ import annotations

from pathlib import Path

import pytest

from recsys.serving.delta.apply import apply_delta
from recsys.training.continual import packages
from tests.recsys.training.continual.walk_runs import (
    NAMES,
    WITHOUT_CONTENT,
    files_of,
    walk,
    write_walk,
)


def words_of(folder: Path) -> list[str]:
    return [*WITHOUT_CONTENT, "--continual.packages", str(folder)]


@pytest.mark.long
def test_a_package_and_its_deltas_are_the_newest_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_walk(tmp_path / "data", 3)
    out, words = tmp_path / "packages", words_of(tmp_path / "packages")
    walk(tmp_path, tmp_path / "run", *words, last="2025-11-09")
    assert sorted(files.name for files in out.iterdir()) == [
        *NAMES[:2],
        f"{NAMES[1]}.delta",
        "newest",
    ]
    made = apply_delta(out / NAMES[0], out / f"{NAMES[1]}.delta", tmp_path / "made")
    assert made.files and files_of(tmp_path / "made") == files_of(out / NAMES[1])
    assert (out / "newest").resolve() == (out / NAMES[1]).resolve()

    with monkeypatch.context() as failing:
        failing.setattr(packages, "_export", lambda *_: 1 / 0)  # as if it was killed
        with pytest.raises(ZeroDivisionError):
            walk(tmp_path, tmp_path / "run", *words)
    walk(tmp_path, tmp_path / "run", *words)  # nothing is left to train on
    assert sorted(each.name for each in out.iterdir() if each.is_dir()) == [*NAMES[1:3], "newest"]
    delta = apply_delta(tmp_path / "made", out / f"{NAMES[2]}.delta", tmp_path / "later")
    assert delta.files and files_of(tmp_path / "later") == files_of(out / NAMES[2])


def test_items_with_a_bounded_vocabulary_have_no_package(tmp_path: Path) -> None:
    write_walk(tmp_path / "data", 1, bounded_items=True)
    with pytest.raises(ValueError, match=r"continual\.packages.*'item'.*bounded"):
        walk(tmp_path, tmp_path / "run", *words_of(tmp_path / "packages"))
    assert not (tmp_path / "run" / "continual.json").exists()


def test_packages_lie_beside_the_run(tmp_path: Path) -> None:
    write_walk(tmp_path / "data", 1)
    with pytest.raises(ValueError, match=r"continual\.packages .*run/packages: lies in"):
        walk(tmp_path, tmp_path / "run", *words_of(tmp_path / "run" / "packages"))
