"""The loader's benchmark measures every case and judges those that have a bar."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.loader import BAR, BAR_HISTORY, MOST_WAITING, Case, Measured, benchmark


def test_every_case_is_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark(
        tmp_path, history=[3], workers=[1], rows=64, items=20, batch_size=16, passes=1,
        step_ms=1.0, results=tmp_path / "results",
    )  # fmt: skip
    lines = (tmp_path / "results" / "loader.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["case"]["content"], r["case"]["num_workers"]) for r in records] == [
        (False, 0),
        (False, 1),
        (True, 0),
        (True, 1),
    ]
    for record in records:
        assert record["samples_per_second"] > 0 and record["per_core"] > 0
        assert (record["waiting"] is None) == (record["case"]["num_workers"] == 0)
        assert record["passes"] is None  # such a short history has no bar
    assert "| 3 | text, image | 1 |" in capsys.readouterr().out


def test_a_bar_holds_for_content_at_its_history_alone() -> None:
    alone = Measured(Case(BAR_HISTORY, True, 0), 0.0, BAR, 0.1, waiting=None)
    assert alone.passes is True
    assert replace(alone, per_core=BAR - 1).passes is False
    assert replace(alone, waiting=MOST_WAITING).passes is False
    assert replace(alone, waiting=MOST_WAITING / 2, per_core=1.0).passes is True
    for other in (Case(BAR_HISTORY, False, 0), Case(1000, True, 0)):
        assert replace(alone, case=other).passes is None
