"""The benchmark of continual training judges each requirement, and cuts the log by time."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.continual.runs import rows_trained, view_before
from recsys.storage.location import Location
from tests.recsys.training.continual.walk_runs import NAMES, ROWS, write_walk


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
