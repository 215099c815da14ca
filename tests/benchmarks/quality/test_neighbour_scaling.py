"""The benchmark of neighbours by the number of users: it measures, and a fall ends it."""

import json
from pathlib import Path

import pytest

from benchmarks.quality.neighbour_scaling import GAUC_TOLERANCE, _require_scaling, benchmark


def test_each_number_of_users_is_measured(tmp_path: Path) -> None:
    benchmark(quick=True, results=tmp_path)
    lines = (tmp_path / "neighbour_scaling.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["users"] for record in records] == [50, 100]
    assert all(record["gauc_regression"] > 0.5 and record["gauc_votes"] > 0.5 for record in records)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [({"gauc_votes": 0.7 - 2 * GAUC_TOLERANCE}, "gauc_votes falls"), ({"step_ms": 20.0}, "costs")],
)
def test_a_fall_or_a_dearer_step_ends_the_benchmark(changes: dict[str, float], cause: str) -> None:
    fewer = {"gauc_regression": 0.6, "gauc_votes": 0.7, "step_ms": 10.0}
    _require_scaling([fewer, fewer])
    with pytest.raises(SystemExit, match=cause):
        _require_scaling([fewer, fewer | changes])
