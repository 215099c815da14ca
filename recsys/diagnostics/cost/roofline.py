"""Measures the machine's peak rates, which are the roofline of the measured steps.

A large matrix product gives FLOP/s and a large copy gives bytes/s. They run with the threads and
ranks of the steps, between rounds of them, so that other load slows both alike. The median over
rounds is the anchor; the best is kept as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from statistics import median

import torch
from torch import Tensor

GEMM_SIZE = 2048
COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Anchor:
    """Measured rates of one rank."""

    flops_per_second: float
    bytes_per_second: float


def measure_anchor(
    gemm_size: int = GEMM_SIZE,
    copy_bytes: int = COPY_BYTES,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Anchor:
    """Time a product of square matrices and a copy; its bytes count twice, read and written."""
    left = torch.randn(gemm_size, gemm_size, device=device, dtype=dtype)
    right, product = torch.randn_like(left), torch.empty_like(left)
    gemm_seconds = _seconds(lambda: torch.mm(left, right, out=product))
    source = torch.ones(copy_bytes // 4, device=device)
    target = torch.ones_like(source)  # touches its pages before the clock starts
    copy_seconds = _seconds(lambda: target.copy_(source))
    return Anchor(2 * gemm_size**3 / gemm_seconds, 2 * copy_bytes / copy_seconds)


def _seconds(work: Callable[[], Tensor]) -> float:
    wait_for_device()
    begin = time.perf_counter()
    work()
    wait_for_device()
    return time.perf_counter() - begin


def wait_for_device() -> None:
    """Wait for the GPU, whose calls return before the work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def typical(anchors: list[Anchor]) -> Anchor:
    """Return the median of each rate."""
    return Anchor(*map(median, zip(*map(astuple, anchors))))


def best(anchors: list[Anchor]) -> Anchor:
    """Return the maximum of each rate."""
    return Anchor(*map(max, zip(*map(astuple, anchors))))
