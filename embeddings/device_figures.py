"""Public figures of devices: memory, arithmetic and links.

The figures come from the makers' data sheets, per device: dense (not sparse) FLOP/s, bytes per
second in one direction, and memory as the driver reports it, rounded down. Real rates are lower, so
times computed from them are lower bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

GIB = 2**30


@dataclass(frozen=True)
class DeviceFigures:
    """One device of a rank, and its share of the machine around it."""

    name: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: int  # memory for tables: of the GPU, or of the host for a CPU
    memory_bandwidth: float  # bytes/s
    fp32_flops: float  # FLOP/s of matrix products
    bf16_flops: float
    node_bandwidth: float  # bytes/s to devices of the same node
    network_bandwidth: float  # bytes/s to other nodes
    host_memory_bytes: int = 128 * GIB


@dataclass
class FigureOverrides:
    """Figures that replace those of the data sheet; None keeps the data sheet's."""

    memory_bytes: float | None = None
    """Memory for tables in bytes, for instance 4e10."""
    memory_bandwidth: float | None = None
    """Bandwidth of that memory in bytes/s."""
    fp32_flops: float | None = None
    """Rate of float32 matrix products in FLOP/s."""
    bf16_flops: float | None = None
    """Rate of bfloat16 matrix products in FLOP/s."""
    node_bandwidth: float | None = None
    """Bandwidth between the devices of a node in bytes/s."""
    network_bandwidth: float | None = None
    """Bandwidth of each device to other nodes in bytes/s."""

    def applied(self, device: DeviceFigures) -> DeviceFigures:
        """Return the figures of ``device`` with the overrides applied.

        Raises:
            ValueError: a figure is not positive.
        """
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if not value > 0:
                raise ValueError(f"figures.{name} is {value}; give a positive number")
        if "memory_bytes" in given:
            given["memory_bytes"] = int(given["memory_bytes"])
        return replace(device, **given)


# SXM modules in the makers' eight-GPU machines, one network port per GPU.
DEVICES = {
    device.name: device
    for device in (
        DeviceFigures("a100", "cuda", 79 * GIB, 2.039e12, 19.5e12, 312e12, 300e9, 25e9, 128 * GIB),
        DeviceFigures("h100", "cuda", 79 * GIB, 3.35e12, 67e12, 989e12, 450e9, 50e9, 256 * GIB),
        DeviceFigures("h200", "cuda", 139 * GIB, 4.8e12, 67e12, 989e12, 450e9, 50e9, 256 * GIB),
        DeviceFigures("b200", "cuda", 178 * GIB, 8.0e12, 75e12, 2250e12, 900e9, 50e9, 256 * GIB),
    )
}
