"""What the machine itself can do, measured beside the steps: the floor that no step goes under.

A large matrix product gives FLOP/s and a large copy gives bytes/s, with the threads and ranks of
the steps, between their rounds, so that whatever else the machine does slows both alike. The
median over rounds is the anchor; the best is kept beside it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch

GEMM_SIZE = 2048
COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Anchor:
    """One measurement of one rank."""

    flops_per_second: float
    bytes_per_second: float


def measure_anchor(gemm_size: int = GEMM_SIZE, copy_bytes: int = COPY_BYTES) -> Anchor:
    """A float32 product of two square matrices, and a copy, whose bytes count read and written."""
    left = torch.randn(gemm_size, gemm_size)
    right, product = torch.randn_like(left), torch.empty_like(left)
    begin = time.perf_counter()
    torch.mm(left, right, out=product)
    gemm_seconds = time.perf_counter() - begin
    source = torch.ones(copy_bytes // 4)
    target = torch.ones_like(source)  # its pages are touched before the clock starts
    begin = time.perf_counter()
    target.copy_(source)
    copy_seconds = time.perf_counter() - begin
    return Anchor(2 * gemm_size**3 / gemm_seconds, 2 * copy_bytes / copy_seconds)


def typical(anchors: list[Anchor]) -> Anchor:
    """The median of each."""
    return Anchor(
        median(anchor.flops_per_second for anchor in anchors),
        median(anchor.bytes_per_second for anchor in anchors),
    )


def best(anchors: list[Anchor]) -> Anchor:
    """The highest of each."""
    return Anchor(
        max(anchor.flops_per_second for anchor in anchors),
        max(anchor.bytes_per_second for anchor in anchors),
    )
