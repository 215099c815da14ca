"""The benchmark of serving at sizes of seconds: it measures each way and a load with exchanges."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serving.__main__ import GRAPH, GRPC, REST, SCORER, serving


@pytest.mark.long
def test_each_way_and_the_load_are_measured(
    package_run: tuple[Path, Path, np.ndarray], tmp_path: Path
) -> None:
    serving(
        package_run[1],
        *(5, 10, 3),
        load_seconds=8,
        share=0.3,
        swap_every=2.5,
        results=tmp_path,
    )

    ways = [json.loads(line) for line in (tmp_path / "serving.jsonl").read_text().splitlines()]
    assert [way["way"] for way in ways] == [GRAPH, SCORER, REST, GRPC]
    assert all(0 < way["p50"] <= way["p99"] for way in ways)
    (load,) = (way["load"] for way in ways if way["load"])
    assert load["failed"] == {} and len(load["versions"]) == 2
    assert sum(load["versions"].values()) == load["requests"] > 0
    assert "10 candidates" in (tmp_path / "serving.md").read_text()
