"""Rounds of steps: variants in processes of their own, on one and two ranks, and their ratios."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.timing.ranks import RankReport
from benchmarks.timing.rounds import QUICK_EFFORT, Measurement, measure, ratio
from benchmarks.timing.steps import Variant
from tests.benchmarks.variants import quick_variant


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


def test_a_rank_that_fails_ends_the_benchmark_with_its_cause(tmp_path: Path) -> None:
    missing = quick_variant(tmp_path).changed("missing", data=str(tmp_path / "nowhere"))
    with pytest.raises(RuntimeError, match=r"variant 'missing', rank 0(.|\n)*nowhere"):
        measure([missing], QUICK_EFFORT)
