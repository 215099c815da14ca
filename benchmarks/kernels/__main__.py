"""Whole training steps with and without kernels, and those of an earlier commit, by turns.

    python -m benchmarks.kernels --out FOLDER
    python -m benchmarks.kernels --out FOLDER --before CLONE

Each variant has a process of one thread; those of a case take turns, a few steps each, and a ratio
is the median over rounds of the ratio within a round. With `--before` the base is the code of that
clone; else it is this code with `kernels: torch`. Writes `kernel_steps.jsonl`, `.md` and `.png`
into `--results`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.kernels.cases import cases
from benchmarks.results import RESULTS, ROOT, Result, require_own_folder, write_result
from benchmarks.timing.steps import Variant

WORKER = Path(__file__).with_name("worker.py")
TORCH, NATIVE, BEFORE = "kernels: torch", "kernels: native", "before"


class Worker:
    """A process that runs the steps of a variant in a clone."""

    def __init__(self, variant: Variant, clone: Path, threads: int) -> None:
        """Start the process."""
        read, write = os.pipe()
        environment = os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(WORKER), str(write), json.dumps(asdict(variant))]
        self.process = subprocess.Popen(
            [*command, str(threads)],
            cwd=clone,
            env=environment,
            stdin=subprocess.PIPE,
            text=True,
            pass_fds=[write],
        )
        os.close(write)
        self.answers = os.fdopen(read)

    def ask(self, request: str) -> Any:
        """Send a request and return its answer.

        Raises:
            RuntimeError: the process has ended; its error is above.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        answer = self.answers.readline()
        if not answer:
            raise RuntimeError("a process has ended; its error stands above")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.answers.close()


def kernel_steps(
    out: Path,
    before: Path | None = None,
    only: list[str] | None = None,
    rounds: int = 5,
    seconds: float = 1.5,
    threads: int = 1,
    quick: bool = False,
    results: Path = RESULTS,
) -> None:
    """Measure each case by turns.

    Args:
        out: folder for the datasets and the encoded items.
        before: clone of an earlier commit that is measured as well.
        only: words that a case's name must have one of, e.g. '["DLRM", "history 5"]'.
        rounds: number of rounds.
        seconds: the least time of a variant's steps in a round.
        threads: threads of each process.
        quick: tiny sizes, whose figures mean nothing.
        results: folder for the figures.
    """
    require_own_folder(quick, results)
    records = []
    for case in cases(out.resolve(), quick):
        if not only or any(word in case.name for word in only):
            records.append(_measured(case, before, rounds, seconds, threads))
            print(json.dumps(records[-1]), flush=True)
    write_result(_result(records), results)


def _measured(
    case: Variant, before: Path | None, rounds: int, seconds: float, threads: int
) -> dict[str, Any]:
    variants = {
        TORCH: (case.changed(case.name, "--kernels", "torch"), ROOT),
        NATIVE: (case.changed(case.name, "--kernels", "native"), ROOT),
    }
    if before is not None:
        variants = {BEFORE: (case, before.resolve()), **variants}
    workers = {kind: Worker(*of, threads) for kind, of in variants.items()}
    try:
        steps = {}
        for kind, worker in workers.items():
            steps[kind] = max(2, round(seconds / worker.ask("run 4")[-1]))
        times: dict[str, list[float]] = {kind: [] for kind in workers}
        for _ in range(rounds):
            for kind, worker in workers.items():
                times[kind].append(median(worker.ask(f"run {steps[kind]}")))
        peaks = {kind: worker.ask("peak") for kind, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    base = next(iter(times))
    ratios = {
        kind: [ours / theirs for ours, theirs in zip(times[base], times[kind])] for kind in times
    }
    return {
        "benchmark": "kernel_steps",
        "case": case.name,
        "step_seconds": times,
        "ratios": ratios,
        "peak_bytes": peaks,
        "overrides": case.overrides,
    }


def _result(records: list[dict[str, Any]]) -> Result:
    kinds = list(records[0]["step_seconds"]) if records else []
    columns = ["training step", *(f"{kind}, ms" for kind in kinds)]
    columns += [f"{kind}, x {kinds[0]}" for kind in kinds[1:]]
    columns += [f"{kind}, peak GB" for kind in kinds]
    rows = []
    for record in records:
        row = [record["case"]]
        row += [f"{1e3 * median(record['step_seconds'][kind]):.1f}" for kind in kinds]
        for kind in kinds[1:]:
            of_rounds = record["ratios"][kind]
            spread = f"({min(of_rounds):.2f} to {max(of_rounds):.2f})"
            row.append(f"{median(of_rounds):.2f} {spread}")
        row += [f"{record['peak_bytes'][kind] / 1e9:.2f}" for kind in kinds]
        rows.append(row)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names = [record["case"] for record in records][::-1]
        ratios = [median(record["ratios"][kinds[-1]]) for record in records][::-1]
        axes.bar_label(axes.barh(names, ratios), fmt=" %.2f")
        axes.set_xlabel(f"{kinds[-1]}: times as fast as {kinds[0]}")

    title = "Training steps with kernels"
    return Result("kernel_steps", title, records, columns, rows, draw)


if __name__ == "__main__":
    auto_cli(kernel_steps, as_positional=False)
