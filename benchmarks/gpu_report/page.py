"""The report's page, made from finished stages: what passed, and the speed of each model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.stages import Stage

COLUMNS = (
    "model",
    "precision",
    "batch",
    "from",
    "samples/s",
    "kernels",
    "busy",
    "waits",
    "peak GB",
)


def write_page(out: Path, plan: Sequence[Stage], results: Path) -> Path:
    """Write RESULTS/gpu.md and gpu.jsonl from the records under `out`; return the page."""
    from benchmarks.results import Result, write_result

    records = {stage.name: stage.record(out) for stage in plan}
    figures = [
        figure for record in records.values() if record is not None for figure in record["figures"]
    ]
    checks = [
        f"{name}: {_outcome(record)}."
        for name, record in records.items()
        if not name.startswith("speed")
    ]
    num_remaining = sum(record is None for record in records.values())
    sentences = ["Checks, in order:", *[f"- {check}" for check in checks]]
    if num_remaining:
        sentences.append(f"{num_remaining} stages have not run yet.")
    lines = [{"benchmark": "gpu", **figure} for figure in figures]
    rows = [_cells(figure) for figure in figures]
    write_result(Result("gpu", "One GPU", lines, COLUMNS, rows, reading=sentences), results)
    return results / "gpu.md"


def _outcome(record: dict[str, Any] | None) -> str:
    if record is None:
        return "not run yet"
    if record["rc"] == 0:
        return f"passed in {record['seconds']:.0f} s"
    last = [line for line in record["output"].splitlines() if line.strip()][-1:]
    return f"failed with {record['rc']}: {' '.join(last)[:200]}"


def _cells(figure: dict[str, Any]) -> list[str]:
    about = [figure["model"], figure["precision"], f"{figure['rows']:,}", figure["source"]]
    if "error" in figure:
        return [*about, figure["error"], "", "", "", ""]
    return [
        *about,
        f"{figure['samples_per_second']:,.0f}",
        f"{figure['kernels']:,.0f}",
        f"{figure['busy_share']:.0%}",
        f"{figure['waits']:.1f}",
        f"{figure['peak_gb']:.1f}",
    ]
