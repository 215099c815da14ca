"""What a benchmark writes says how it was measured, without the folders of the machine."""

from __future__ import annotations

import sys

import pytest

from benchmarks.results import ROOT, without_places


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
