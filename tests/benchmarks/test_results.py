"""What a benchmark writes says how it was measured, without the folders of the machine."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks.printed import HEAD, with_section
from benchmarks.results import ROOT, provenance, without_places


def test_folders_of_the_command_and_of_the_clone_are_named_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--out", "/disk/bench/", "--results", "mine"])
    text = f"{ROOT}/benchmarks/settings/a.yaml /disk/bench/data --out /disk/bench mine"
    assert without_places(text) == "benchmarks/settings/a.yaml OUT/data --out OUT mine"
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--out=/disk/bench", "--data", "/"])
    assert without_places("a/b /disk/bench/data") == "a/b OUT/data"
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--runs", "[/disk/one,/disk/two/]"])
    assert without_places("--runs [/disk/one,/disk/two/]") == "--runs [RUNS,RUNS/]"


@pytest.mark.parametrize(
    ("file", "command"),
    [
        (ROOT / "benchmarks" / "scaling.py", "python -m benchmarks.scaling --quick"),
        (ROOT / "benchmarks" / "quality" / "__main__.py", "python -m benchmarks.quality --quick"),
    ],
)
def test_the_command_is_the_one_that_runs_the_benchmark_again(
    file: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(file), "--quick"])
    assert provenance()["command"] == command


def test_a_command_recorded_again_replaces_its_section() -> None:
    page = with_section(HEAD, ["make", "train"], "step 1\nall 0.5\n")
    page = with_section(page, ["recsys", "doctor"], "fine  \n")
    page = with_section(page, ["make", "train"], "train/0 [0]:all 0.6\n")
    assert re.findall("^## (.*)$", page, re.M) == ["`recsys doctor`", "`make train`"]
    assert "\nfine\n" in page and "\nall 0.6\n" in page and "0.5" not in page
