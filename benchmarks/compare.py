"""Time training beside an ID-only and a plain PyTorch baseline, on the same batches in one run.

    python -m benchmarks.compare --out FOLDER

A ratio is the median over rounds of the ratio within a round. FOLDER keeps the dataset (0.7 GB).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from benchmarks.results import RESULTS, Result, require_other_folder, variant_record, write_result
from benchmarks.settings import Device, setting
from benchmarks.timing.rounds import FULL_EFFORT, QUICK_EFFORT, Effort, Measurement, measure, ratio
from benchmarks.timing.steps import Variant

PLAIN, ID_ONLY = "plain PyTorch", "ID only"
FULL = ("--content.history.mode", "full")
SIMILARITY = ("--content.history.similarity_features", "true")


def compare(
    out: Path,
    only: list[str] | None = None,
    overrides: list[str] | None = None,
    effort: Effort = FULL_EFFORT,
    device: Device = "cpu",
    quick: bool = False,
    in_process: bool = False,
    results: Path = RESULTS,
) -> list[Measurement]:
    """Measure the variants against the baselines.

    Args:
        out: folder for the dataset and the encoded items.
        only: names of the variants to measure; default: all.
        overrides: arguments of `recsys train` for all variants, e.g. '["--batch_size", "256"]'.
        device: cpu, or cuda for a GPU per rank.
        effort: rounds, steps and other limits of the measurement.
        quick: tiny sizes, whose figures mean nothing.
        in_process: measure all in this process instead of one process per variant.
        results: folder for the figures.
    """
    require_other_folder(quick, results)
    selected = variants(out, quick, overrides or [], device)
    unknown = sorted(set(only or []) - {variant.name for variant in selected})
    if unknown:
        names = [variant.name for variant in selected]
        raise ValueError(f"--only: no variant {unknown}; choose some of {names}")
    selected = [variant for variant in selected if not only or variant.name in only]
    measured = measure(selected, QUICK_EFFORT if quick else effort, in_process)
    write_result(_result(measured), results)
    return measured


def variants(out: Path, quick: bool, overrides: list[str], device: Device = "cpu") -> list[Variant]:
    """Return the variants of setting A: itself, its baselines, in bf16, and with similarities."""
    sized = setting("A", quick)
    data, arguments = sized.prepared(out, device)
    base = Variant("bank_lora", str(sized.recipe), data, (*arguments, *overrides))
    return [
        base.changed(PLAIN, *FULL, kind="plain"),
        base.changed("full", *FULL),
        base.changed(ID_ONLY, "--content", "none"),
        base,
        base.changed("bank_lora, bf16", "--precision", "bf16"),
        base.changed("bank_lora, similarity features", *SIMILARITY),
    ]


def _result(measured: list[Measurement]) -> Result:
    baselines = {m.variant.name: m for m in measured if m.variant.name in (PLAIN, ID_ONLY)}
    columns = ["variant", "samples/s P50", "step, ms", "peak GB"]
    columns += [f"x {name} (lowest to highest)" for name in baselines]
    rows: list[Sequence[str]] = []
    records = []
    for timing in measured:
        ratios = {name: ratio(timing, baseline) for name, baseline in baselines.items()}
        metrics: dict[str, Any] = {
            "samples_per_second": {f"P{p}": timing.samples_per_second(p) for p in (10, 50, 90)},
            "step_seconds": timing.step_seconds,
            "seconds": timing.seconds,
            "peak_bytes": timing.peak_bytes,
            "ratios": {name: vars(value) for name, value in ratios.items()},
            "world_size": timing.world_size,
        }
        records.append({"benchmark": "compare", **metrics, **variant_record(timing.variant)})
        row = [timing.variant.name, f"{timing.samples_per_second(50):,.0f}"]
        row += [f"{1e3 * timing.step_seconds:.1f}", f"{timing.peak_bytes / 1e9:.2f}"]
        row += [f"{r.median:.2f} ({r.lowest:.2f} to {r.highest:.2f})" for r in ratios.values()]
        rows.append(row)

    title = "Setting A: the product beside its baselines"
    return Result("compare", title, records, columns, rows)


if __name__ == "__main__":
    auto_cli(compare, as_positional=False)
