"""The benchmarks of serving measure a package, and write their pages."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serving.__main__ import GRAPH, GRPC, REST, SCORER, serving
from benchmarks.serving.accuracy import PACKAGES, accuracy

Run = tuple[Path, Path, np.ndarray]


def test_each_way_to_a_score_is_timed(package_run: Run, tmp_path: Path) -> None:
    _, package, _ = package_run
    serving(package, history=5, candidates=4, rounds=2, starts=1, results=tmp_path)
    records = map(json.loads, (tmp_path / "serving.jsonl").read_text().splitlines())
    p50 = {record["way"]: record["p50"] for record in records}
    assert list(p50) == [GRAPH, SCORER, REST, GRPC]
    assert min(p50.values()) > 0 and (tmp_path / "serving.md").exists()


@pytest.mark.long
def test_packages_are_exchanged_under_load_and_no_request_fails(
    package_run: Run, tmp_path: Path
) -> None:
    _, package, _ = package_run
    sizes = {"history": 5, "candidates": 4, "rounds": 2, "starts": 1}
    serving(package, **sizes, load_seconds=8, swap_every=3, results=tmp_path)  # type: ignore[arg-type]
    records = map(json.loads, (tmp_path / "serving.jsonl").read_text().splitlines())
    (load,) = (record["load"] for record in records if record["load"])
    assert load["failed"] == {} and len(load["versions"]) == 2
    assert set(load["different_scores"].values()) == {1}


@pytest.mark.long
def test_smaller_types_are_compared_with_predictions(package_run: Run, tmp_path: Path) -> None:
    folder, *_ = package_run
    accuracy(tmp_path / "packages", [folder / "run"], rows=16, results=tmp_path)
    record = json.loads((tmp_path / "package_accuracy.jsonl").read_text())
    assert list(record["auc"]) == list(PACKAGES) and record["rows"] == 16
    assert record["difference"] <= 1e-5
    assert record["megabytes"]["int8"] < record["megabytes"]["fp32"]
