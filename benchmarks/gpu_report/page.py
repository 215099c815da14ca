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
    speeds = [
        speed for record in records.values() if record is not None for speed in record["figures"]
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
    lines = [{"benchmark": "gpu", **speed} for speed in speeds]
    rows = [_cells(speed) for speed in speeds]
    write_result(Result("gpu", "One GPU", lines, COLUMNS, rows, reading=sentences), results)
    return results / "gpu.md"


def _outcome(record: dict[str, Any] | None) -> str:
    if record is None:
        return "not run yet"
    if record["rc"] == 0:
        return f"passed in {record['seconds']:.0f} s"
    last = [line for line in record["output"].splitlines() if line.strip()][-1:]
    return f"failed with {record['rc']}: {' '.join(last)[:200]}"


def _cells(speed: dict[str, Any]) -> list[str]:
    cells = [speed["model"], speed["precision"], f"{speed['rows']:,}", speed["source"]]
    if "error" in speed:
        return [*cells, speed["error"], "", "", "", ""]
    return [
        *cells,
        f"{speed['samples_per_second']:,.0f}",
        f"{speed['kernels']:,.0f}",
        f"{speed['busy_share']:.0%}",
        f"{speed['waits']:.1f}",
        f"{speed['peak_gb']:.1f}",
    ]
