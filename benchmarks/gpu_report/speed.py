"""Speed of a model at several batch sizes: samples/s, kernels, busy share and waits of a step."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.dataset import DatasetSize, write_dataset
from benchmarks.gpu_report.bare import bare_steps
from benchmarks.gpu_report.categories import write_categories
from benchmarks.gpu_report.stages import BATCH_SIZES, PRECISIONS
from benchmarks.settings import FOLDER, setting
from benchmarks.timing.step_work import wait_for_device
from benchmarks.timing.steps import ProductSteps, Variant
from recsys.distributed.ranks import Ranks, joined_ranks

QUICK_BATCHES = (8, 16)
# Calls by which the host waits for the GPU.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
WITHOUT_CONTENT = ("--content", "none", "--contrastive.weight", "0")


def speed(
    model: str, out: Path, precision: str = "fp32", device: str = "cuda", quick: bool = False
) -> None:
    """Print the figures of each batch size and source of batches, one JSON line each.

    Args:
        model: dlrm, din_LENGTH, hstu_LENGTH, setting_a, or bare: TorchRec's own loop.
        out: folder of the datasets.
        precision: fp32, tf32 or bf16.
        device: cuda or cpu.
        quick: tiny sizes, whose figures mean nothing.
    """
    with joined_ranks(device) as ranks:  # type: ignore[arg-type]
        for rows in QUICK_BATCHES if quick else BATCH_SIZES:
            for source in ("memory", "parquet"):
                run = {"model": model, "precision": precision, "rows": rows, "source": source}
                try:
                    step = _steps(model, out, precision, rows, source, ranks, quick)
                    rounds = (2, 2, 1) if quick else (10, 30, 3)
                    metrics: dict[str, Any] = measured(step, rows, *rounds)
                except torch.OutOfMemoryError:
                    metrics = {"error": "out of memory"}
                print("Figures:", json.dumps(run | metrics), flush=True)
                step = None  # type: ignore[assignment]


def _steps(
    model: str, out: Path, precision: str, rows: int, source: str, ranks: Ranks, quick: bool
) -> Callable[[], Any]:
    """Return a function that makes one training step."""
    if model == "bare":
        return bare_steps(write_categories(out / "data", quick), rows, source, ranks.device)
    recipe, data, overrides = _recipe(model, out, quick)
    overrides += ("--batch_size", str(rows), "--device", ranks.device.type, *PRECISIONS[precision])
    # 65,536 rows are all of a dataset: one batch of them is enough.
    loaded = 0 if source == "parquet" else (4 if rows <= 8192 else 1)
    variant = Variant(model, recipe, data, overrides, loaded_batches=loaded)
    return ProductSteps(variant, ranks).step


def _recipe(model: str, out: Path, quick: bool) -> tuple[str, str, tuple[str, ...]]:
    """Return recipe, dataset and overrides of a model."""
    recipe, folder = str(FOLDER / "a.yaml"), out / "data"
    overrides: tuple[str, ...]
    if model == "dlrm":
        overrides = ("--ranking", "{name: dlrm}", "--embedding.dim", "16", *WITHOUT_CONTENT)
        return recipe, str(write_categories(folder, quick)), overrides
    if model == "setting_a":
        sized = setting("A", quick)
        data, overrides = sized.prepared(folder)
        return str(sized.recipe), data, overrides
    backbone, _, length = model.partition("_")
    size = DatasetSize(history=int(length), num_rows=65_536, text_dim=4, image_dim=0)
    if quick:
        size = replace(size, history=4, num_rows=64, num_items=60, num_users=40, num_tags=20)
    data = str(write_dataset(folder / f"{model}{'-quick' * quick}", size))
    return recipe, data, ("--ranking", f"{{name: {backbone}}}", *WITHOUT_CONTENT)


def measured(
    step: Callable[[], Any], rows: int, warm_up: int, count: int, profiled: int
) -> dict[str, float]:
    """Time `count` steps, then profile others; of a CPU there are no kernels."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warm_up):
        step()
    wait_for_device()
    # Blocks of steps: a GPU that is waited for after each would be idle between them.
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(max(count // 3, 1)):
            step()
        wait_for_device()
        seconds.append((time.perf_counter() - begin) / max(count // 3, 1))
    return {"samples_per_second": rows / median(seconds), **_profiled(step, profiled)}


def _profiled(step: Callable[[], Any], steps: int) -> dict[str, float]:
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    with profile(activities=activities) as profiler:
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        wait_for_device()
        elapsed = time.perf_counter() - begin
    events = profiler.events()
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    waits = [event for event in events if event.name in WAITS]
    ranges = [(event.time_range.start, event.time_range.end) for event in kernels]
    return {
        "kernels": len(kernels) / steps,
        "busy_share": busy_microseconds(ranges) / 1e6 / elapsed,
        "waits": max(len(waits) - 1, 0) / steps,  # one is the wait after the steps
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0,
    }


def busy_microseconds(ranges: list[tuple[float, float]]) -> float:
    """Return the length of the union of ranges of time: kernels of several streams overlap."""
    total, last = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


if __name__ == "__main__":
    auto_cli(speed, as_positional=False)
