"""Measure what each kernel gains of a training step: steps with all kernels, and without each.

    python -m benchmarks.kernels.gains --out FOLDER

All steps run in turns in one process of one thread. Their CPU time is measured, which other
processes hardly affect. A ratio is the median over rounds of the ratio within a round.
"""

import importlib
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from jsonargparse import auto_cli

from benchmarks.kernels.__main__ import cases
from benchmarks.results import RESULTS, Result, require_other_folder, write_result
from benchmarks.timing.ranks import silence_advice_to_library_developers
from benchmarks.timing.steps import ProductSteps, Variant
from recsys.distributed.ranks import joined_ranks

# The module that asks for each kernel.
CALLERS = {
    "target_attention": "recsys.ranking.layers.target_attention",
    "content_interest": "recsys.ranking.layers.content_interest",
    "fusion": "recsys.content.fusion",
    "dot_interaction": "recsys.ranking.dlrm",
}
KERNELS = {
    "A, bank_lora": ["target_attention", "content_interest", "fusion"],
    "A, bank_lora, similarity features": ["target_attention", "content_interest", "fusion"],
    "DLRM 26 x 100,000 x 16, batch 8192": ["dot_interaction"],
}


def gains(
    out: Path, rounds: int = 5, steps: int = 5, quick: bool = False, results: Path = RESULTS
) -> None:
    """Measure each case by turns.

    Args:
        out: folder for the datasets and the encoded items.
        rounds: number of rounds.
        steps: steps of each variant in a round.
        quick: tiny sizes, whose figures mean nothing.
        results: folder for the figures.
    """
    require_other_folder(quick, results)
    torch.set_num_threads(1)
    silence_advice_to_library_developers()
    records = []
    with joined_ranks("cpu") as ranks:
        for case in cases(out.resolve(), quick):
            if case.name in KERNELS:
                native = case.changed(case.name, "--kernels", "native")
                records += _measured(native, ProductSteps(native, ranks), rounds, steps)
    columns = ["training step", "without", "with all, ms", "x (lowest to highest)"]
    rows = [
        [
            record["case"],
            f"`{record['kernel']}`",
            f"{record['milliseconds']:.1f}",
            f"{median(record['x']):.2f} ({min(record['x']):.2f} to {max(record['x']):.2f})",
        ]
        for record in records
    ]
    title = "Processor time of a step without a kernel, beside all kernels"
    write_result(Result("kernel_gains", title, records, columns, rows), results)


def _measured(case: Variant, run: ProductSteps, rounds: int, steps: int) -> list[dict[str, Any]]:
    def seconds(count: int) -> float:
        times = []
        for _ in range(count):
            begin = time.process_time()
            run.step()
            times.append(time.process_time() - begin)
        return median(times)

    seconds(3)
    all_kernels: list[float] = []
    ratios: dict[str, list[float]] = {kernel: [] for kernel in KERNELS[case.name]}
    for _ in range(rounds):
        all_kernels.append(seconds(steps))
        for kernel, speed_ups in ratios.items():
            caller = importlib.import_module(CALLERS[kernel])
            with mock.patch.object(caller, "has_native", return_value=False):
                seconds(1)
                speed_ups.append(seconds(steps) / all_kernels[-1])
    return [
        {
            "benchmark": "kernel_gains",
            "case": case.name,
            "kernel": kernel,
            "milliseconds": 1e3 * median(all_kernels),
            "x": speed_ups,
        }
        for kernel, speed_ups in ratios.items()
    ]


if __name__ == "__main__":
    auto_cli(gains, as_positional=False)
