"""Speed of training in one setting, its parts, and its distance to the machine's limits.

    python -m benchmarks.throughput --out FOLDER --setting A
    torchx run -s local_cwd launch/components.py:benchmark --nproc 2 -- throughput --out FOLDER

Samples/s at P10, P50 and P90, the step by part with its FLOPs and least bytes, bytes that
collectives send, the peak of memory, and each part's roofline: the time its FLOPs or bytes take at
the rates of a large matrix product and a large copy that are measured between the rounds. Writes
`throughput_SETTING.jsonl`, `.md` and `.png` into `--results`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.results import RESULTS, Result, require_own_folder, variant_record, write_result
from benchmarks.settings import setting as named_setting
from benchmarks.timing.efficiency import Efficiency
from benchmarks.timing.rounds import FULL_EFFORT, QUICK_EFFORT, Effort, Measurement, measure
from benchmarks.timing.steps import Variant
from recsys.diagnostics.cost.batch_counts import BatchCounts
from recsys.diagnostics.cost.roofline import best
from recsys.diagnostics.profile.step_trace import PARTS


def throughput(
    out: Path,
    setting: Literal["A", "B"] = "A",
    ranks: int = 1,
    from_files: bool = True,
    overrides: list[str] | None = None,
    effort: Effort = FULL_EFFORT,
    quick: bool = False,
    here: bool = False,
    results: Path = RESULTS,
) -> Measurement:
    """Measure one setting.

    Args:
        out: folder for the dataset and the encoded items.
        setting: A (stored features) or B (raw text through an encoder).
        ranks: number of processes; under torchrun or torchx, its number applies instead.
        from_files: read the batches from Parquet within the steps; else use loaded ones in turn.
        overrides: words of `recsys train`, e.g. '["--batch_size", "256"]'.
        effort: rounds, steps and other limits of the measurement.
        quick: tiny sizes, whose figures mean nothing.
        here: measure in this process instead of new ones.
        results: folder for the figures.
    """
    require_own_folder(quick, results)
    chosen = named_setting(setting, quick)
    data, words = chosen.prepared(out)
    variant = Variant(
        f"Setting {setting}",
        str(chosen.recipe),
        data,
        (*words, *(overrides or [])),
        ranks=ranks,
        loaded_batches=0 if from_files else 16,
    )
    (measured,) = measure([variant], QUICK_EFFORT if quick else effort, here)
    write_result(_result(f"throughput_{setting.lower()}", measured), results)
    return measured


def _result(name: str, measured: Measurement) -> Result:
    efficiency = Efficiency.of(measured)
    rows: list[Sequence[str]] = []
    for part in PARTS:
        seconds, roofline = efficiency.seconds.get(part), efficiency.rooflines.get(part, 0.0)
        if seconds is not None:
            rows.append(
                (
                    part,
                    f"{1e3 * seconds:.2f}",
                    f"{seconds / measured.step_seconds:.0%}",
                    f"{1e3 * roofline:.2f}",
                    f"{roofline / seconds:.0%}" if roofline else "",
                )
            )
    total, roofline = measured.step_seconds, efficiency.roofline
    rows.append(
        ("step", f"{1e3 * total:.2f}", "100%", f"{1e3 * roofline:.2f}", f"{roofline / total:.0%}")
    )
    columns = ("part of a step", "ms", "share", "roofline, ms", "roofline / measured")
    title = f"{measured.variant.name}: throughput on {measured.world_size} rank(s)"

    def draw(figure: Figure) -> None:
        _draw(figure, measured, efficiency)

    records = [_record(name, measured, efficiency)]
    return Result(name, title, records, columns, rows, draw, _reading(measured, efficiency))


def _reading(measured: Measurement, efficiency: Efficiency) -> list[str]:
    rates = ", ".join(f"P{p} {measured.samples_per_second(p):,.0f}" for p in (10, 50, 90))
    anchor, peak = efficiency.anchor, best(measured.anchors)
    sent = sum(row["bytes_sent"]["median"] for row in measured.profile["collectives"])
    sentences = [
        f"Samples/s: {rates}. Peak of resident memory per rank: {measured.peak_bytes / 1e9:.2f} GB "
        f"(before the steps {measured.reports[0].resting_bytes / 1e9:.2f}). Each rank sends "
        f"{sent / 1e6:.2f} MB per step.",
        f"The roofline is {efficiency.share(measured):.0%} of the step, at "
        f"{anchor.flops_per_second / 1e9:.1f} GFLOP/s of a large matrix product and "
        f"{anchor.bytes_per_second / 1e9:.1f} GB/s of a large copy, medians of the same run (best "
        f"{peak.flops_per_second / 1e9:.1f} and {peak.bytes_per_second / 1e9:.1f}).",
    ]
    lines = ["| work of a step | GFLOP forward | backward | MB forward | backward | roofline, ms |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for part in efficiency.costs:
        flops = [f"{work.flops / 1e9:.3f}" for work in (part.forward, part.backward)]
        numbers = [f"{work.bytes / 1e6:.2f}" for work in (part.forward, part.backward)]
        cells = [part.name, *flops, *numbers, f"{1e3 * part.roofline(anchor):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*sentences, "\n".join(lines)]


def _record(name: str, measured: Measurement, efficiency: Efficiency) -> dict[str, Any]:
    report = measured.reports[0]
    return {
        "benchmark": name,
        "samples_per_second": {f"P{p}": measured.samples_per_second(p) for p in (10, 50, 90)},
        "step_seconds": measured.step_seconds,
        "seconds": measured.seconds,
        "peak_bytes": measured.peak_bytes,
        "resting_bytes": report.resting_bytes,
        "parts_seconds": efficiency.seconds,
        "roofline_seconds": efficiency.rooflines,
        "roofline_share": efficiency.share(measured),
        "costs": [asdict(part) for part in efficiency.costs],
        "anchor": asdict(efficiency.anchor),
        "best_anchor": asdict(best(measured.anchors)),
        "collectives": measured.profile["collectives"],
        "counts": asdict(BatchCounts.mean(report.counts)),
        "world_size": measured.world_size,
        **variant_record(measured.variant),
    }


def _draw(figure: Figure, measured: Measurement, efficiency: Efficiency) -> None:
    axes = figure.subplots()
    parts = [part for part in PARTS if part in efficiency.seconds][::-1]
    seconds = [1e3 * efficiency.seconds[part] for part in parts]
    rooflines = [1e3 * efficiency.rooflines.get(part, 0.0) for part in parts]
    bars = axes.barh(parts, seconds, label="measured")
    axes.barh(parts, rooflines, height=0.4, label="roofline")
    shares = [
        f" {roofline / second:.0%}" if roofline else ""
        for roofline, second in zip(rooflines, seconds)
    ]
    axes.bar_label(bars, shares)
    axes.set_xlabel(
        f"ms of a step of {1e3 * measured.step_seconds:.1f} ms, "
        f"{measured.samples_per_second(50):,.0f} samples/s; the roofline's share beside each part"
    )
    axes.legend()


if __name__ == "__main__":
    auto_cli(throughput, as_positional=False)
