"""Growth of a step's cost with ranks, table rows, history, unique items and batch size.

    python -m benchmarks.scaling --out FOLDER

Setting A with one size changed at a time. Each point is measured in turns with the first of its
curve, so that the growth is of one run. `ranks, apart` are jobs of one rank each at the same time,
which send nothing: the upper limit of the machine. Writes `scaling.jsonl`, `.md` and `.png` into
`--results`. FOLDER needs about 2 GB; the largest table needs 13 GB of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.results import RESULTS, Result, require_own_folder, variant_record, write_result
from benchmarks.scaling_curves import Curve, curves_of
from benchmarks.timing.ranks import require_not_launched
from benchmarks.timing.rounds import (
    FULL_EFFORT,
    QUICK_EFFORT,
    Effort,
    Measurement,
    Ratio,
    measure,
    ratio,
)
from benchmarks.timing.step_work import BatchCounts


@dataclass
class Point:
    """One measured size of a curve."""

    curve: Curve
    x: float
    measured: Measurement
    slower: Ratio  # seconds of a step over seconds of the first point

    @property
    def counts(self) -> BatchCounts:
        """Mean counts of the measured batches."""
        return BatchCounts.mean(self.measured.counts)


def scaling(
    out: Path,
    curves: list[str] | None = None,
    ranks: list[int] | None = None,
    table_rows: list[int] | None = None,
    effort: Effort = replace(FULL_EFFORT, profiled=0),  # noqa: B008
    quick: bool = False,
    here: bool = False,
    results: Path = RESULTS,
) -> list[Point]:
    """Measure the curves.

    Args:
        out: folder for the datasets and the encoded items.
        curves: names of curves, to leave the others out.
        ranks: numbers of ranks on this machine; default 1 and 2.
        table_rows: rows of the user table; default 1e5 to 5e7.
        effort: rounds, steps and other limits of the measurement.
        quick: tiny sizes, whose figures mean nothing.
        here: measure in this process instead of new ones; without the curves of ranks.
        results: folder for the figures.
    """
    require_not_launched("scaling")
    require_own_folder(quick, results)
    all_curves = curves_of(out, quick, ranks, table_rows)
    unknown = sorted(set(curves or []) - {curve.name for curve in all_curves})
    if unknown:
        names = [curve.name for curve in all_curves]
        raise ValueError(f"--curves: no curve {unknown}; choose some of {names}")
    effort = replace(QUICK_EFFORT, profiled=0) if quick else effort
    points: list[Point] = []
    for curve in all_curves:
        if curve.name in (curves or [curve.name]) and not (here and curve.x_name == "ranks"):
            points += _measure(curve, effort, here)
    write_result(_result(points), results)
    return points


def _measure(curve: Curve, effort: Effort, here: bool) -> list[Point]:
    (x, first), *others = curve.points()
    points: list[Point] = []
    if not others:
        (alone,) = measure([first], effort, here)
        return [Point(curve, x, alone, Ratio(1.0, 1.0, 1.0))]
    for other_x, other in others:
        before, after = measure([first, other], effort, here)
        if not points:
            points.append(Point(curve, x, before, Ratio(1.0, 1.0, 1.0)))
        points.append(Point(curve, other_x, after, _slower(after, before)))
    return points


def _slower(this: Measurement, first: Measurement) -> Ratio:
    """Divide the seconds of a step, whatever its rows, by those of `first`."""
    rows = this.rows / first.rows
    faster = ratio(this, first)
    return Ratio(rows / faster.median, rows / faster.highest, rows / faster.lowest)


def _result(points: list[Point]) -> Result:
    columns = ["curve", "x", "samples/s", "step, ms", "x step of first", "peak GB"]
    columns += ["unique / history", "encoded per row"]
    rows: list[Sequence[str]] = []
    records = []
    for point in points:
        measured, counts, slower = point.measured, point.counts, point.slower
        unique = counts.unique_history / max(counts.history, 1)
        rows.append(
            (
                point.curve.name,
                f"{_x_of(point):.9g}" if point.x >= 10 else f"{_x_of(point):.3g}",
                f"{measured.samples_per_second(50):,.0f}",
                f"{1e3 * measured.step_seconds:.1f}",
                f"{slower.median:.2f} ({slower.lowest:.2f} to {slower.highest:.2f})",
                f"{measured.peak_bytes / 1e9:.2f}",
                f"{unique:.3f}",
                f"{counts.encoded / counts.rows:.3f}",
            )
        )
        records.append(_record(point))
    reading = [_growth([p for p in points if p.curve is c]) for c in _curves(points)]
    title = "Setting A: how the cost of a step grows"
    return Result(
        "scaling", title, records, columns, rows, lambda figure: _draw(figure, points), reading
    )


def _curves(points: list[Point]) -> list[Curve]:
    return list({id(point.curve): point.curve for point in points}.values())


def _growth(points: list[Point]) -> str:
    first, last = points[0], points[-1]
    samples = last.measured.rows / first.measured.rows / last.slower.median
    of_what = f"({first.curve.x_name})"
    return (
        f"{first.curve.name}: from {_x_of(first):,.4g} to {_x_of(last):,.4g} {of_what} "
        f"a step takes {last.slower.median:.2f} times as long, at {samples:.2f} times the "
        f"samples/s, and the peak of memory grows from {first.measured.peak_bytes / 1e9:.2f} to "
        f"{last.measured.peak_bytes / 1e9:.2f} GB."
    )


def _x_of(point: Point) -> float:
    if point.curve.x_name != "unique / history":
        return point.x
    return point.counts.unique_history / max(point.counts.history, 1)


def _record(point: Point) -> dict[str, Any]:
    measured = point.measured
    return {
        "benchmark": "scaling",
        "curve": point.curve.name,
        "x_name": point.curve.x_name,
        "x": _x_of(point),
        "samples_per_second": {f"P{p}": measured.samples_per_second(p) for p in (10, 50, 90)},
        "step_seconds": measured.step_seconds,
        "seconds": measured.seconds,
        "slower_than_first": vars(point.slower),
        "peak_bytes": measured.peak_bytes,
        "resting_bytes": max(report.resting_bytes for report in measured.reports),
        "counts": asdict(point.counts),
        "world_size": measured.world_size,
        **variant_record(measured.variant),
    }


def _draw(figure: Figure, points: list[Point]) -> None:
    """Draw a panel per size; step times as lines, peaks of memory dashed."""
    names = list(dict.fromkeys(curve.x_name for curve in _curves(points)))
    columns = min(len(names), 3)
    grid = figure.subplots(-(-len(names) // columns), columns, squeeze=False)
    for axes, x_name in zip(grid.flat, names):
        memory = axes.twinx()
        for curve in [curve for curve in _curves(points) if curve.x_name == x_name]:
            mine = sorted((p for p in points if p.curve is curve), key=_x_of)
            xs = [_x_of(p) for p in mine]
            milliseconds = [1e3 * p.measured.step_seconds for p in mine]
            (line,) = axes.plot(xs, milliseconds, marker="o", label=curve.name)
            peaks = [p.measured.peak_bytes / 1e9 for p in mine]
            memory.plot(xs, peaks, linestyle="--", color=line.get_color())
        axes.set(xlabel=x_name, ylabel="ms of a step", xscale="log", yscale="log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
        memory.set(ylabel="peak GB (dashed)", ylim=(0, None))
        axes.grid(which="both", alpha=0.3)
        axes.legend()
    for axes in list(grid.flat)[len(names) :]:
        axes.remove()


if __name__ == "__main__":
    auto_cli(scaling, as_positional=False)
