"""The benchmark of continual training judges each requirement, and cuts the log by time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.continual.__main__ import _verdicts
from benchmarks.continual.runs import CONTINUAL, RETRAINED, Arrival, rows_trained, view_before
from recsys.evaluation.scores import SplitScores
from recsys.storage.location import Location
from tests.recsys.training.continual.walk_runs import NAMES, ROWS, write_walk


def scores(noise: float) -> SplitScores:
    rows, rng = np.arange(400), np.random.default_rng(0)
    labels = rng.integers(0, 2, (400, 1)).astype(np.float32)
    logits = labels + noise * rng.normal(size=(400, 1)).astype(np.float32)
    return SplitScores(rows, rows // 10, rows, rows, labels, logits, ("liked",))


def test_each_requirement_is_judged() -> None:
    names, arrival = ["part=1", "part=2"], Arrival(100, {"score": 1.0, "total": 11.0}, 10.0)
    equal = {way: {"part=2": scores(1.0)} for way in (CONTINUAL, RETRAINED)}
    rows = {CONTINUAL: 15, RETRAINED: 100}
    assert list(_verdicts(equal, rows, names, arrival).values()) == [True, True, True]
    worse = {**equal, CONTINUAL: {"part=2": scores(1.5)}}
    rows, arrival = {CONTINUAL: 16, RETRAINED: 100}, replace(arrival, plain=9.0)
    assert list(_verdicts(worse, rows, names, arrival).values()) == [False, False, False]


def test_a_view_has_the_partitions_before_and_is_tested_on_the_next(tmp_path: Path) -> None:
    write_walk(tmp_path / "data")
    view = Location.of(view_before(tmp_path, NAMES, 2))
    counts = {
        split: sum(
            pq.read_metadata(file.path).num_rows for file in (view / split).files(".parquet")
        )
        for split in ("train", "valid", "test")
    }
    assert counts == {"train": ROWS[0] + ROWS[1], "valid": ROWS[2], "test": ROWS[2]}
    assert rows_trained(tmp_path, NAMES, 2, []) == counts["train"]
    first_rows = rows_trained(tmp_path, NAMES, 1, [])
    assert rows_trained(tmp_path, NAMES, 2, [4]) == counts["train"] + 3 * first_rows
