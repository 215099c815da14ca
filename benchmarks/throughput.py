"""Measure training speed in one setting, its parts, and its distance to the machine's limits.

    python -m benchmarks.throughput --out FOLDER --setting A
    torchx run -s local_cwd launch/components.py:benchmark --nproc 2 -- throughput --out FOLDER

Samples/s at P10, P50 and P90, the time of each part of a step, and peak memory. The share of the
step that its FLOPs would take at the rate of a large matrix product shows the distance.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Literal

from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.results import RESULTS, Result, require_other_folder, variant_record, write_result
from benchmarks.settings import Device
from benchmarks.settings import setting as named_setting
from benchmarks.timing.rounds import FULL_EFFORT, QUICK_EFFORT, Effort, Measurement, measure
from benchmarks.timing.step_work import PARTS, BatchCounts
from benchmarks.timing.steps import Variant


def throughput(
    out: Path,
    setting: Literal["A", "B"] = "A",
    ranks: int = 1,
    from_files: bool = True,
    overrides: list[str] | None = None,
    effort: Effort = FULL_EFFORT,
    device: Device = "cpu",
    quick: bool = False,
    in_process: bool = False,
    results: Path = RESULTS,
) -> Measurement:
    """Measure one setting.

    Args:
        out: folder for the dataset and the encoded items.
        setting: A (stored features) or B (raw text through an encoder).
        ranks: number of processes; under torchrun or torchx, its number applies instead.
        from_files: read the batches from Parquet within the steps; else use loaded ones in turn.
        overrides: arguments of `recsys train`, e.g. '["--batch_size", "256"]'.
        device: cpu, or cuda for a GPU per rank.
        effort: rounds, steps and other limits of the measurement.
        quick: tiny sizes, whose figures mean nothing.
        in_process: measure in this process instead of new ones.
        results: folder for the figures.
    """
    require_other_folder(quick, results)
    sized = named_setting(setting, quick)
    data, arguments = sized.prepared(out, device)
    variant = Variant(
        f"Setting {setting}",
        str(sized.recipe),
        data,
        (*arguments, *(overrides or [])),
        ranks=ranks,
        loaded_batches=0 if from_files else 16,
    )
    (measured,) = measure([variant], QUICK_EFFORT if quick else effort, in_process)
    write_result(_result(f"throughput_{setting.lower()}", measured), results)
    return measured


def _result(name: str, measured: Measurement) -> Result:
    parts, total = measured.part_seconds, measured.step_seconds
    seconds = {part: parts[part] for part in PARTS if part in parts} | {"step": total}
    rows: list[Sequence[str]] = [
        (part, f"{1e3 * value:.2f}", f"{value / total:.0%}") for part, value in seconds.items()
    ]
    columns = ("part of a step", "ms", "share")
    title = f"{measured.variant.name}: throughput on {measured.world_size} rank(s)"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bars = list(seconds)[-2::-1]
        axes.barh(bars, [1e3 * seconds[part] for part in bars])
        axes.set_xlabel(
            f"ms of a step of {1e3 * total:.1f} ms, "
            f"{measured.samples_per_second(50):,.0f} samples/s"
        )

    return Result(name, title, [_record(name, measured)], columns, rows, draw, _reading(measured))


def _reading(measured: Measurement) -> list[str]:
    rates = ", ".join(f"P{p} {measured.samples_per_second(p):,.0f}" for p in (10, 50, 90))
    arithmetic, rate = measured.arithmetic_seconds, median(measured.matmul_rates)
    assert arithmetic is not None
    return [
        f"Samples/s: {rates}. Peak of resident memory per rank: {measured.peak_bytes / 1e9:.2f} "
        f"GB (before the steps {measured.reports[0].resting_bytes / 1e9:.2f}).",
        f"The {measured.profile['flops'] / 1e9:.2f} GFLOP of a step take {1e3 * arithmetic:.2f} "
        f"ms, {arithmetic / measured.step_seconds:.0%} of it, at the {rate / 1e9:.1f} GFLOP/s of a "
        f"large matrix product, the median of the same run (best "
        f"{max(measured.matmul_rates) / 1e9:.1f}).",
    ]


def _record(name: str, measured: Measurement) -> dict[str, Any]:
    report = measured.reports[0]
    return {
        "benchmark": name,
        "samples_per_second": {f"P{p}": measured.samples_per_second(p) for p in (10, 50, 90)},
        "step_seconds": measured.step_seconds,
        "seconds": measured.seconds,
        "peak_bytes": measured.peak_bytes,
        "resting_bytes": report.resting_bytes,
        "parts_seconds": measured.part_seconds,
        "flops": measured.profile["flops"],
        "arithmetic_seconds": measured.arithmetic_seconds,
        "matmul_flops_per_second": median(measured.matmul_rates),
        "counts": asdict(BatchCounts.mean(report.counts)),
        "world_size": measured.world_size,
        **variant_record(measured.variant),
    }


if __name__ == "__main__":
    auto_cli(throughput, as_positional=False)
