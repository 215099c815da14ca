"""Measure a ladder from a naive implementation to all optimisations, one change per row.

    python -m benchmarks.ladder --out FOLDER --setting A

Each row is measured in turns with the row it changes. The speed-up over the first row is the
product of these ratios. Hand-written notes in `ladder_SETTING_notes.md` end the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli

from benchmarks.results import RESULTS, Result, require_other_folder, variant_record, write_result
from benchmarks.settings import Device
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
from benchmarks.timing.steps import Variant


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
        """Items encoded per step, on all ranks; None for the plain baseline, which counts none."""
        reports = self.measured.reports
        if not reports[0].counts:
            return None
        return sum(sum(c.encoded for c in r.counts) / len(r.counts) for r in reports)


def ladder(
    out: Path,
    setting: Literal["A", "B"] = "A",
    only: list[str] | None = None,
    effort: Effort = FULL_EFFORT,
    device: Device = "cpu",
    quick: bool = False,
    in_process: bool = False,
    results: Path = RESULTS,
) -> list[Rung]:
    """Measure the rows of one setting.

    Args:
        out: folder for the dataset and the encoded items.
        setting: A (stored features) or B (raw text through an encoder).
        only: names of rows; the rows they build on are included.
        device: cpu, or cuda for a GPU per rank.
        effort: rounds, steps and other limits of the measurement; each row needs a profile.
        quick: tiny sizes, whose figures mean nothing.
        in_process: measure in this process instead of new ones; rows of several ranks are left out.
        results: folder for the figures.
    """
    require_not_launched("ladder")
    require_other_folder(quick, results)
    sized = named_setting(setting, quick)
    rows = rows_of(setting, str(sized.recipe), *sized.prepared(out, device))
    rows = _chosen(rows, only, in_process)
    rungs: dict[str, Rung] = {}
    for row in rows:
        rungs[row.name] = _measure(row, rungs, QUICK_EFFORT if quick else effort, in_process)
    measured_rungs = list(rungs.values())
    write_result(
        _result(f"ladder_{setting.lower()}", f"Setting {setting}", measured_rungs), results
    )
    return measured_rungs


def _chosen(rows: list[Row], only: list[str] | None, in_process: bool) -> list[Row]:
    by_name = {row.name: row for row in rows}
    unknown = sorted(set(only or []) - set(by_name))
    if unknown:
        raise ValueError(f"--only: no row {unknown}; choose some of {list(by_name)}")
    names: set[str] = set()
    for name in only or list(by_name):
        if in_process and by_name[name].variant.ranks > 1:
            continue
        ancestor: str | None = name
        while ancestor is not None:
            names.add(ancestor)
            ancestor = by_name[ancestor].base
    return [row for row in rows if row.name in names]


def _measure(row: Row, rungs: dict[str, Rung], effort: Effort, in_process: bool) -> Rung:
    if row.base is None:
        (alone,) = measure([row.variant], effort, in_process)
        return Rung(row, alone, None, Ratio(1.0, 1.0, 1.0), 1.0)
    base = rungs[row.base]
    base_measured, measured = measure([base.row.variant, row.variant], effort, in_process)
    speed_up = ratio(measured, base_measured)
    return Rung(row, measured, base_measured, speed_up, base.over_first * speed_up.median)


def reading(rung: Rung) -> str:
    """Summarise the profiles in one sentence: where the change saved most, and what is left."""
    parts = rung.measured.part_seconds
    total = sum(parts.values())
    largest = sorted(parts, key=lambda part: -parts[part])[:2]
    remaining = " and ".join(f"{part} ({parts[part] / total:.0%})" for part in largest)
    if rung.base is None:
        return f"Most of a step is {remaining}."
    base, parts = _comparable(rung.base.part_seconds, parts)
    change = {part: parts.get(part, 0.0) - base.get(part, 0.0) for part in {*base, *parts}}
    part = max(change, key=lambda name: abs(change[name]))
    verb = "falls" if change[part] < 0 else "rises"
    return (
        f"{part} {verb} most, from {1e3 * base.get(part, 0.0):.1f} to "
        f"{1e3 * parts.get(part, 0.0):.1f} ms of a step that went from "
        f"{1e3 * sum(base.values()):.1f} to {1e3 * total:.1f} ms; most of it is now {remaining}."
    )


def _comparable(
    base: dict[str, float], parts: dict[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    if "forward" not in base:
        return base, parts
    joined = {"forward": 0.0}
    for part, seconds in parts.items():
        name = part if part in base else "forward"
        joined[name] = joined.get(name, 0.0) + seconds
    return base, joined


def _result(name: str, title: str, rungs: list[Rung]) -> Result:
    columns = ("change", "samples/s", "step, ms", "x row", "x first", "items encoded", "arithmetic")
    rows: list[Sequence[str]] = []
    records = []
    for rung in rungs:
        measured, speed_up = rung.measured, rung.speed_up
        arithmetic = measured.arithmetic_seconds
        share = None if arithmetic is None else arithmetic / measured.step_seconds
        gain = "" if rung.base is None else f"{speed_up.median:.2f} of {rung.row.base}"
        rows.append(
            (
                rung.row.name,
                f"{measured.samples_per_second(50):,.0f}",
                f"{1e3 * measured.step_seconds:.1f}",
                gain,
                f"{rung.over_first:.2f}",
                "" if rung.encoded is None else f"{rung.encoded:,.0f}",
                "" if share is None else f"{share:.0%}",
            )
        )
        records.append({"benchmark": name, **_record(rung, share)})
    sentences = [f"- **{rung.row.name}**: {rung.row.summary} {reading(rung)}" for rung in rungs]
    return Result(
        name,
        f"{title}: from naive to everything on, one change per row",
        records,
        columns,
        rows,
        None,
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


@dataclass(frozen=True)
class Row:
    """One rung; `base` is the name of the row it changes, None for the first."""

    name: str
    base: str | None
    summary: str  # a sentence
    variant: Variant


class _Rows:
    def __init__(self, first: Variant, summary: str) -> None:
        self.rows = [Row(first.name, None, summary, first)]

    def add(self, name: str, summary: str, *overrides: str, base: str = "", **fields: Any) -> None:
        by_name = {row.name: row for row in self.rows}
        base_row = by_name[base] if base else self.rows[-1]
        variant = base_row.variant.changed(name, *overrides, **fields)
        self.rows.append(Row(name, base_row.name, summary, variant))


def rows_of(setting: str, recipe: str, data: str, overrides: tuple[str, ...]) -> list[Row]:
    """Return the ladder of setting A or B."""
    variant = Variant("first", recipe, data, (*overrides, "--num_workers", "0"))
    return rows_of_a(variant) if setting == "A" else rows_of_b(variant)


def rows_of_a(variant: Variant) -> list[Row]:
    """Return rows with stored features: first less work per step, then work beside the step."""
    mode = "--content.history.mode"
    first = variant.changed("plain PyTorch", mode, "full", kind="plain")
    rows = _Rows(first, "Every item of every padded history is encoded, on loaded batches.")
    rows.add(
        "items encoded once",
        "TorchRec's tables and pipeline; each distinct item is encoded and looked up once.",
        kind="product",
    )
    rows.add(
        "memory bank",
        "Histories are read from the bank instead of encoded; their map is dense.",
        *(mode, "bank_dense"),
    )
    rows.add("LoRA map", "The history map is frozen but for a low rank.", mode, "bank_lora")
    rows.add(
        "batches from files", "Parquet is read and batches are built in the step.", loaded_batches=0
    )
    rows.add("prefetch", "Both happen in threads beside it.", "--num_workers", "1")
    types = ("--embedding.communication.forward", "--embedding.communication.backward")
    rows.add("2 ranks", "Two processes of one thread, the batch of each as before.", ranks=2)
    rows.add(
        "bf16 communication",
        "Looked-up vectors and their gradients travel in 16 bits.",
        *(types[0], "bf16", types[1], "bf16"),
    )
    rows.add(
        "bf16", "Dense parts in bfloat16, on one rank.", "--precision", "bf16", base="prefetch"
    )
    rows.add("compile", "Dense parts compiled, on one rank.", "--compile", "true", base="prefetch")
    return rows.rows


def rows_of_b(variant: Variant) -> list[Row]:
    """Return rows with raw text through an encoder: which parts of the encoder are skipped."""
    cache = "--content.modalities.title.cache_frozen_layers"
    dedup = ("--content.dedup", "global")
    first = variant.changed("no cache", cache, "false")
    rows = _Rows(first, "All layers of the encoder run in each step, the top one with LoRA.")
    rows.add("prefix cache", "Outputs of the frozen layers come from disk.", cache, "true")
    rows.add(
        "encoder share 20 %",
        "The encoder runs for a fifth of a step's items, the others take their last outputs.",
        *("--content.encoder_share", "0.2"),
    )
    rows.add("2 ranks", "Two processes, each encodes its own items.", base="prefix cache", ranks=2)
    rows.add("global dedup", "Each item of both batches is encoded by one rank.", *dedup)
    rows.add("2 ranks, no cache", "The heavy encoder on two processes.", base="no cache", ranks=2)
    rows.add("global dedup, no cache", "Each item of both is encoded by one rank.", *dedup)
    return rows.rows


if __name__ == "__main__":
    auto_cli(ladder, as_positional=False)
