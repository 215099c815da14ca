"""Rounds of steps: variants in processes of their own, on one and two ranks, and their ratios."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import spawn
from pathlib import Path

import pytest

from benchmarks.timing.ranks import RankReport
from benchmarks.timing.rounds import QUICK_EFFORT, Measurement, measure, ratio
from benchmarks.timing.steps import Variant
from tests.benchmarks.variants import quick_variant
from tests.warm_python import warm_environment


def measurement(seconds: list[list[float]], rows: int = 100) -> Measurement:
    """Of one rank."""
    report = RankReport(rows, 2, 1, [])
    return Measurement(Variant("v", "", ""), 1, seconds, [1.0], [report])


def test_a_ratio_is_taken_within_rounds() -> None:
    # The machine is three times slower in the second round, for both.
    this = measurement([[0.1, 0.1, 0.5], [0.3, 0.3, 0.3], [0.1, 0.1, 0.1]])
    other = measurement([[0.2, 0.2, 0.2], [0.6, 0.6, 0.6], [0.4, 0.4, 0.4]])
    actual = ratio(this, other)
    assert (actual.median, actual.lowest, actual.highest) == pytest.approx((2.0, 2.0, 4.0))
    twice = ratio(measurement(this.seconds, rows=200), other)
    assert twice.median == pytest.approx(4.0)


@pytest.fixture
def spawning_warm() -> Iterator[None]:
    """Processes that multiprocessing spawns have the libraries imported."""
    usual = spawn.get_executable()
    spawn.set_executable(warm_environment()["PYTHON_EXEC"])
    yield
    spawn.set_executable(usual)


@pytest.mark.long
def test_variants_on_one_and_two_ranks_take_turns_in_processes_of_their_own(
    tmp_path: Path, spawning_warm: None
) -> None:
    one = quick_variant(tmp_path)
    variants = [one, one.changed("two", ranks=2), one.changed("apart", ranks=2, apart=True)]
    alone, together, apart = measure(variants, QUICK_EFFORT)
    assert [m.world_size for m in (alone, together, apart)] == [1, 2, 2]
    assert together.rows == apart.rows == 2 * alone.rows == 32
    for measured in (alone, together, apart):
        assert [len(round_seconds) for round_seconds in measured.seconds] == [2, 2]
        assert len(measured.matmul_rates) == 2 * measured.world_size
        steps = QUICK_EFFORT.warm_up + 2 * QUICK_EFFORT.steps
        assert all(len(report.counts) == steps for report in measured.reports)
        assert all(r.peak_bytes >= r.resting_bytes > 10**8 for r in measured.reports)


def test_a_rank_that_fails_ends_the_benchmark_with_its_cause(tmp_path: Path) -> None:
    missing = quick_variant(tmp_path).changed("missing", data=str(tmp_path / "nowhere"))
    with pytest.raises(RuntimeError, match=r"variant 'missing', rank 0(.|\n)*nowhere"):
        measure([missing], QUICK_EFFORT)
