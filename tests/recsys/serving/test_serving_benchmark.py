"""The benchmark of serving at sizes of seconds: it measures each way and a load with exchanges."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serving.__main__ import GRAPH, GRPC, REST, SCORER, serving
from benchmarks.serving.load import ratio_of_constant_times
from benchmarks.serving.users_together import users_together


def test_waiting_alone_makes_p99_several_times_p50() -> None:
    """The mean of many arrivals is that of M/D/1, however fast a request is."""
    ratios = [ratio_of_constant_times(100_000, rate, share=0.7) for rate in (1, 10)]

    assert ratios == pytest.approx([4.3, 4.3], abs=0.2)
    assert ratio_of_constant_times(100_000, 1, share=0.01) == pytest.approx(1, abs=0.05)


@pytest.mark.long
def test_each_way_and_the_load_are_measured(
    package_run: tuple[Path, Path, np.ndarray], tmp_path: Path
) -> None:
    serving(
        package_run[1],
        *(5, 10, 3),
        starts=2,
        load_seconds=8,
        share=0.3,
        swap_every=2.5,
        results=tmp_path,
    )

    ways = [json.loads(line) for line in (tmp_path / "serving.jsonl").read_text().splitlines()]
    assert [way["way"] for way in ways] == [GRAPH, SCORER, REST, GRPC]
    assert all(0 < way["p50"] <= way["p99"] for way in ways)
    assert all(len(way["p50_of_starts"]) == 2 for way in ways)
    (load,) = (way["load"] for way in ways if way["load"])
    assert load["failed"] == {} and len(load["versions"]) == 2
    assert set(load["different_scores"].values()) == {1}  # none of a mixture of both packages
    assert load["resident_mb"][0][1] > 0
    assert sum(load["versions"].values()) == load["requests"] > 0
    assert "10 candidates" in (tmp_path / "serving.md").read_text()


@pytest.mark.long
def test_requests_in_one_call_are_measured_beside_one_call_each(tmp_path: Path) -> None:
    users_together(users=2, rounds=1, sizes=((2, 3),), results=tmp_path)

    lines = (tmp_path / "users_together.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [of["backbone"] for of in records] == ["din_dcn", "two_tower"]
    assert all(of["one_by_one"] > 0 and of["together"] > 0 for of in records)
