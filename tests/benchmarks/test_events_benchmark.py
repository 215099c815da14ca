"""The benchmark of `prepare events` compares programs that write the same rows."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.events.__main__ import OURS, QUICK, SQL, benchmark


def test_all_programs_write_the_same_dataset_and_are_measured(tmp_path: Path) -> None:
    results = tmp_path / "results"
    benchmark(tmp_path / "out", users=300, items=50, quick=True, results=results)

    records = [json.loads(line) for line in (results / "events.jsonl").read_text().splitlines()]
    by_job = {(record["job"], record["events"]): record for record in records}
    assert {(OURS, QUICK), (SQL, QUICK)} <= by_job.keys()
    assert by_job[OURS, QUICK]["list_values"] == by_job[SQL, QUICK]["list_values"]
    for record in records:
        assert record["seconds"] > 0 and record["peak"] > 1e6 and record["processor"] > 0
    assert "events/s" in (results / "events.md").read_text()
    assert not any((tmp_path / "out").rglob("*.parquet"))
