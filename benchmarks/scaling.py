"""Growth of a step's cost with ranks, table rows, history, unique items and batch size.

    python -m benchmarks.scaling --out FOLDER

Setting A with one size changed at a time, each in turns with the first point of its curve.
`ranks, apart` are jobs without communication, the machine's upper limit.
FOLDER needs about 2 GB; the largest table needs 13 GB of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.results import RESULTS, Result, require_other_folder, variant_record, write_result
from benchmarks.settings import Device, setting
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
from benchmarks.timing.steps import Variant


@dataclass
class Point:
    """One measured size of a curve."""

    curve: Curve
    x: float
    measured: Measurement
    slower: Ratio  # seconds of a step over seconds of the first point

    @property
    def counts(self) -> BatchCounts:
        return BatchCounts.mean(self.measured.counts)


def scaling(
    out: Path,
    curves: list[str] | None = None,
    ranks: list[int] | None = None,
    table_rows: list[int] | None = None,
    effort: Effort = replace(FULL_EFFORT, profiled=0),  # noqa: B008
    device: Device = "cpu",
    quick: bool = False,
    in_process: bool = False,
    results: Path = RESULTS,
) -> list[Point]:
    """Measure the curves.

    Args:
        out: folder for the datasets and the encoded items.
        curves: names of curves; default: all.
        ranks: numbers of ranks on this machine; default 1 and 2.
        table_rows: rows of the user table; default 1e5 to 5e7.
        device: cpu, or cuda for a GPU per rank.
        effort: rounds, steps and other limits of the measurement.
        quick: tiny sizes, whose figures mean nothing.
        in_process: measure in this process instead of new ones; without the curves of ranks.
        results: folder for the figures.
    """
    require_not_launched("scaling")
    require_other_folder(quick, results)
    all_curves = curves_of(out, quick, ranks, table_rows, device)
    unknown = sorted(set(curves or []) - {curve.name for curve in all_curves})
    if unknown:
        names = [curve.name for curve in all_curves]
        raise ValueError(f"--curves: no curve {unknown}; choose some of {names}")
    effort = replace(QUICK_EFFORT, profiled=0) if quick else effort
    points: list[Point] = []
    for curve in all_curves:
        if curve.name in (curves or [curve.name]) and not (in_process and curve.x_name == "ranks"):
            points += _measure(curve, effort, in_process)
    write_result(_result(points), results)
    return points


def _measure(curve: Curve, effort: Effort, in_process: bool) -> list[Point]:
    (x, first), *later_points = curve.points()
    points: list[Point] = []
    if not later_points:
        (alone,) = measure([first], effort, in_process)
        return [Point(curve, x, alone, Ratio(1.0, 1.0, 1.0))]
    for later_x, later_variant in later_points:
        first_measured, measured = measure([first, later_variant], effort, in_process)
        if not points:
            points.append(Point(curve, x, first_measured, Ratio(1.0, 1.0, 1.0)))
        points.append(Point(curve, later_x, measured, _slower(measured, first_measured)))
    return points


def _slower(measurement: Measurement, first: Measurement) -> Ratio:
    rows = measurement.rows / first.rows
    faster = ratio(measurement, first)
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
    unit = f"({first.curve.x_name})"
    return (
        f"{first.curve.name}: from {_x_of(first):,.4g} to {_x_of(last):,.4g} {unit} "
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


RANKS = (1, 2)
TABLE_ROWS = (100_000, 1_000_000, 10_000_000, 50_000_000)
HISTORIES = (50, 10, 200, 1000)  # the others are compared with the first
BATCH_SIZES = (64, 256, 512, 1024, 2048)
# Few items make few unique ones; drawn evenly, most items of a batch are different ones.
DRAWS: tuple[dict[str, Any], ...] = (
    {"num_items": 1_000},
    {"num_items": 10_000},
    {"num_items": 100_000},
    {"num_items": 100_000, "uniform": True},
)
QUICK_DRAWS: tuple[dict[str, Any], ...] = ({"num_items": 20}, {"num_items": 60, "uniform": True})
FULL = ("--content.history.mode", "full")
ROWS_OF_DATA = 16_384  # enough for the loaded batches of the largest size


@dataclass(frozen=True, eq=False)
class Curve:
    """Points of a name; `build_variant` writes the data it needs."""

    name: str
    x_name: str
    xs: Sequence[float]
    build_variant: Callable[[int], Variant]  # by index in `xs`

    def points(self) -> Iterator[tuple[float, Variant]]:
        for index, x in enumerate(self.xs):
            yield x, self.build_variant(index)


class _Variants:
    def __init__(self, out: Path, quick: bool, device: Device) -> None:
        self.out, self.quick, self.device = out, quick, device
        self.setting = setting("A", quick)
        if not quick:
            self.setting = self.setting.with_data(num_rows=ROWS_OF_DATA)

    def __call__(
        self, name: str, *overrides: str, ranks: int = 1, apart: bool = False, **sizes: Any
    ) -> Variant:
        sized = self.setting.with_data(**sizes)
        data, arguments = sized.prepared(self.out, self.device)
        recipe = str(sized.recipe)
        arguments = (*arguments, *overrides)
        return Variant(name, recipe, data, arguments, ranks=ranks, apart=apart, loaded_batches=8)


def curves_of(
    out: Path,
    quick: bool,
    ranks: list[int] | None,
    table_rows: list[int] | None,
    device: Device = "cpu",
) -> list[Curve]:
    """Return all curves."""
    make = _Variants(out, quick, device)
    rank_counts = ranks or list(RANKS)
    rows = table_rows or list((50, 100) if quick else TABLE_ROWS)
    histories = (2, 6) if quick else HISTORIES
    sizes = (8, 16) if quick else BATCH_SIZES
    draws = QUICK_DRAWS if quick else DRAWS
    top_k = ("--content.history.top_k", "2" if quick else "50")

    def at_ranks(apart: bool) -> Callable[[int], Variant]:
        def build(index: int) -> Variant:
            count = rank_counts[index]
            return make(f"{count} ranks", ranks=count, apart=apart)

        return build

    def at_rows(index: int) -> Variant:
        count, options = rows[index], ("--content", "none")
        return make(f"{count} rows", *options, num_users=count, text_dim=0, image_dim=0)

    def at_history(*options: str) -> Callable[[int], Variant]:
        return lambda index: make(f"history {histories[index]}", *options, history=histories[index])

    def at_size(index: int) -> Variant:
        return make(f"batch {sizes[index]}", "--batch_size", str(sizes[index]))

    def at_draw(*options: str) -> Callable[[int], Variant]:
        return lambda index: make(f"items drawn {index}", *options, **draws[index])

    draw_indices = list(range(len(draws)))
    return [
        Curve("ranks", "ranks", rank_counts, at_ranks(apart=False)),
        Curve("ranks, apart", "ranks", rank_counts, at_ranks(apart=True)),
        Curve("table rows, ID only", "rows of the user table", rows, at_rows),
        Curve("history", "items in each history", histories, at_history()),
        Curve("history, top_k", "items in each history", histories, at_history(*top_k)),
        Curve("batch size", "batch size", sizes, at_size),
        Curve("unique items", "unique / history", draw_indices, at_draw()),
        Curve("unique items, full", "unique / history", draw_indices, at_draw(*FULL)),
    ]


if __name__ == "__main__":
    auto_cli(scaling, as_positional=False)
