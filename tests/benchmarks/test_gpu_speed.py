"""A GPU trains faster than the two cores of the stored figures: no step waits or runs elsewhere."""

import json
from pathlib import Path

import pytest

from benchmarks.results import RESULTS
from benchmarks.throughput import throughput
from benchmarks.timing.rounds import Effort


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", ["false", "auto"])
def test_setting_a_is_faster_on_a_gpu_than_on_two_cores(tmp_path: Path, compiles: str) -> None:
    (record,) = (json.loads(line) for line in (RESULTS / "throughput_a.jsonl").open())
    argv = ["--batch_size", "8192", "--compile", compiles]
    effort = Effort(rounds=2)
    measured = throughput(
        tmp_path,
        from_files=False,
        overrides=argv,
        effort=effort,
        device="cuda",
        in_process=True,
        results=tmp_path,
    )
    assert measured.samples_per_second(50) > 4 * record["samples_per_second"]["P50"]
