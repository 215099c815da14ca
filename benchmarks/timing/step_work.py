"""Counts of one training step: its inputs, its FLOPs, and the time of each part."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from statistics import fmean

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.utils.flop_counter import FlopCounterMode

from recsys.data.batch import Batch
from recsys.kernels import choose_kernels
from recsys.kernels.choice import Kernels

# Parts of a step, by the beginning of the names of their ranges (`recsys.diagnostics.profile`).
RANGES = {
    "## copy_batch_to_gpu": "data",
    "## wait_for_batch": "data",
    "## start_sparse_data_dist": "input dist",
    "## wait_sparse_data_dist": "input dist",
    "## runtime_forward_assemble_KJT": "input dist",
    "## lookup": "lookup",
    "## output dist": "output dist",
    "## encoders": "encoders",
    "## fusion": "fusion",
    "## content": "content",
    "## ranking": "ranking",
    "## losses": "losses",
    "## backward": "backward",
    "## zero_grad": "optimizer",
    "## optimizer": "optimizer",
}
PARTS = (*dict.fromkeys(RANGES.values()), "other")


@dataclass(frozen=True)
class BatchCounts:
    """Numbers of inputs of one step on a rank, or their mean over several."""

    rows: float
    history: float  # items of all histories
    unique_history: float
    encoded: float  # items whose content is encoded

    @staticmethod
    def of(batch: Batch) -> BatchCounts:
        sizes = batch.history.index, batch.history.items, batch.content.items
        return BatchCounts(batch.batch_size, *map(len, sizes))

    @staticmethod
    def mean(counts: Iterable[BatchCounts]) -> BatchCounts:
        return BatchCounts(*map(fmean, zip(*map(astuple, counts), strict=True)))


def part_seconds(events: Iterable[FunctionEvent]) -> dict[str, float]:
    """Return the profiled seconds by part; each moment counts for the innermost range."""
    microseconds: Counter[str] = Counter()

    def add(event: FunctionEvent, outer: str | None) -> None:
        part = next((part for name, part in RANGES.items() if event.name.startswith(name)), outer)
        if part != outer:
            elapsed = event.time_range.elapsed_us()
            microseconds[str(part)] += elapsed
            if outer is not None:
                microseconds[outer] -= elapsed
        if part != "backward":  # a part of the forward that runs again there counts as backward
            for child in event.cpu_children:
                add(child, part)

    for event in events:
        if event.cpu_parent is None:
            add(event, None)
    return {part: microseconds[part] / 1e6 for part in PARTS if part in microseconds}


def step_flops(step: Callable[[], None], kernels: Kernels) -> int:
    """Return the FLOPs of a step, with PyTorch's operations in place of `kernels`."""
    choose_kernels("torch")
    try:
        with FlopCounterMode(display=False) as counter:
            step()
    finally:
        choose_kernels(kernels)
    return counter.get_total_flops()


def matmul_rate(size: int, device: torch.device | str = "cpu") -> float:
    """Return the FLOP/s of a product of square float32 matrices."""
    first = torch.randn(size, size, device=device)
    second, product = torch.randn_like(first), torch.empty_like(first)
    wait_for_device()
    begin = time.perf_counter()
    torch.mm(first, second, out=product)
    wait_for_device()
    return 2 * size**3 / (time.perf_counter() - begin)


def wait_for_device() -> None:
    """Wait for the GPU, whose calls return before the work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
