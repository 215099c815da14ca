"""A ladder from a naive implementation to all optimisations, one change per row.

    python -m benchmarks.ladder --out FOLDER --setting A

Each row is measured in turns with the row it changes, so that its speed-up comes from one run; the
speed-up over the first row is the product of the speed-ups in between. The sentence of each row is
computed from the profiles of both. Writes `ladder_SETTING.jsonl`, `.md` and `.png` into
`--results`; hand-written notes in `ladder_SETTING_notes.md` there end the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.ladder_rows import Row, rows_of
from benchmarks.results import RESULTS, Result, require_own_folder, variant_record, write_result
from benchmarks.settings import setting as named_setting
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


@dataclass
class Rung:
    """A measured row."""

    row: Row
    measured: Measurement
    base: Measurement | None  # the row it changes, in the same run
    speed_up: Ratio  # over `base`
    over_first: float

    @property
    def encoded(self) -> float | None:
        """Items encoded per step, on all ranks; None for the plain twin, which counts none."""
        reports = self.measured.reports
        if not reports[0].counts:
            return None
        return sum(sum(c.encoded for c in r.counts) / len(r.counts) for r in reports)


def ladder(
    out: Path,
    setting: Literal["A", "B"] = "A",
    only: list[str] | None = None,
    effort: Effort = FULL_EFFORT,
    quick: bool = False,
    here: bool = False,
    results: Path = RESULTS,
) -> list[Rung]:
    """Measure the rows of one setting.

    Args:
        out: folder for the dataset and the encoded items.
        setting: A (stored features) or B (raw text through an encoder).
        only: names of rows, to leave the others out; the rows they build on are included.
        effort: rounds, steps and other limits of the measurement; each row needs a profile.
        quick: tiny sizes, whose figures mean nothing.
        here: measure in this process instead of new ones; rows of several ranks are left out.
        results: folder for the figures.
    """
    require_not_launched("ladder")
    require_own_folder(quick, results)
    chosen = named_setting(setting, quick)
    rows = rows_of(setting, str(chosen.recipe), *chosen.prepared(out))
    rows = _chosen(rows, only, here)
    rungs: dict[str, Rung] = {}
    for row in rows:
        rungs[row.name] = _measure(row, rungs, QUICK_EFFORT if quick else effort, here)
    done = list(rungs.values())
    write_result(_result(f"ladder_{setting.lower()}", f"Setting {setting}", done), results)
    return done


def _chosen(rows: list[Row], only: list[str] | None, here: bool) -> list[Row]:
    """Return the rows asked for and the rows they build on, in order."""
    by_name = {row.name: row for row in rows}
    unknown = sorted(set(only or []) - set(by_name))
    if unknown:
        raise ValueError(f"--only: no row {unknown}; choose some of {list(by_name)}")
    wanted: set[str] = set()
    for name in only or list(by_name):
        if here and by_name[name].variant.ranks > 1:
            continue
        above: str | None = name
        while above is not None:
            wanted.add(above)
            above = by_name[above].base
    return [row for row in rows if row.name in wanted]


def _measure(row: Row, rungs: dict[str, Rung], effort: Effort, here: bool) -> Rung:
    if row.base is None:
        (alone,) = measure([row.variant], effort, here)
        return Rung(row, alone, None, Ratio(1.0, 1.0, 1.0), 1.0)
    base = rungs[row.base]
    before, after = measure([base.row.variant, row.variant], effort, here)
    speed_up = ratio(after, before)
    return Rung(row, after, before, speed_up, base.over_first * speed_up.median)


def reading(rung: Rung) -> str:
    """Summarise the profiles in one sentence: where the change saved most, and what is left."""
    after = rung.measured.part_seconds
    total = sum(after.values())
    largest = sorted(after, key=lambda part: -after[part])[:2]
    left = " and ".join(f"{part} ({after[part] / total:.0%})" for part in largest)
    if rung.base is None:
        return f"Most of a step is {left}."
    before, after = _comparable(rung.base.part_seconds, after)
    change = {part: after.get(part, 0.0) - before.get(part, 0.0) for part in {*before, *after}}
    part = max(change, key=lambda name: abs(change[name]))
    verb = "falls" if change[part] < 0 else "rises"
    return (
        f"{part} {verb} most, from {1e3 * before.get(part, 0.0):.1f} to "
        f"{1e3 * after.get(part, 0.0):.1f} ms of a step that went from "
        f"{1e3 * sum(before.values()):.1f} to {1e3 * total:.1f} ms; most of it is now {left}."
    )


def _comparable(
    before: dict[str, float], after: dict[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Sum the parts of the product's forward if the plain twin, which has none, is compared."""
    if "forward" not in before:
        return before, after
    joined = {"forward": 0.0}
    for part, seconds in after.items():
        name = part if part in before else "forward"
        joined[name] = joined.get(name, 0.0) + seconds
    return before, joined


def _result(name: str, title: str, rungs: list[Rung]) -> Result:
    columns = ("change", "samples/s", "step, ms", "x row", "x first", "items encoded", "arithmetic")
    rows: list[Sequence[str]] = []
    records = []
    for rung in rungs:
        measured, speed_up = rung.measured, rung.speed_up
        arithmetic = measured.arithmetic_seconds
        share = None if arithmetic is None else arithmetic / measured.step_seconds
        of_base = "" if rung.base is None else f"{speed_up.median:.2f} of {rung.row.base}"
        rows.append(
            (
                rung.row.name,
                f"{measured.samples_per_second(50):,.0f}",
                f"{1e3 * measured.step_seconds:.1f}",
                of_base,
                f"{rung.over_first:.2f}",
                "" if rung.encoded is None else f"{rung.encoded:,.0f}",
                "" if share is None else f"{share:.0%}",
            )
        )
        records.append({"benchmark": name, **_record(rung, share)})
    sentences = [f"- **{rung.row.name}**: {rung.row.what} {reading(rung)}" for rung in rungs]
    return Result(
        name,
        f"{title}: from naive to everything on, one change per row",
        records,
        columns,
        rows,
        lambda figure: _draw(figure, rungs),
        ["\n".join(sentences)],
    )


def _record(rung: Rung, share: float | None) -> dict[str, Any]:
    measured = rung.measured
    return {
        "row": rung.row.name,
        "base": rung.row.base,
        "samples_per_second": {f"P{p}": measured.samples_per_second(p) for p in (10, 50, 90)},
        "step_seconds": measured.step_seconds,
        "seconds": measured.seconds,
        "speed_up": vars(rung.speed_up),
        "over_first": rung.over_first,
        "items_encoded": rung.encoded,
        "arithmetic_share": share,
        "parts_seconds": measured.part_seconds,
        "base_parts_seconds": None if rung.base is None else rung.base.part_seconds,
        "reading": reading(rung),
        "world_size": measured.world_size,
        "peak_bytes": measured.peak_bytes,
        **variant_record(measured.variant),
    }


def _draw(figure: Figure, rungs: list[Rung]) -> None:
    axes = figure.subplots()
    names = [rung.row.name for rung in rungs][::-1]
    values = [rung.over_first for rung in rungs][::-1]
    bars = axes.barh(names, values)
    axes.bar_label(bars, [f" x {value:.2f}" for value in values])
    axes.set_xscale("log")
    axes.set_xlabel("samples/s over the first row")


if __name__ == "__main__":
    auto_cli(ladder, as_positional=False)
