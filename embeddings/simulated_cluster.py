"""A simulated cluster: public figures of devices, and the planner's view of them.

TorchRec's planner needs sizes of memory, not devices, so tables for thousands of GPUs can be
planned on a laptop. The figures are those of the makers' data sheets, per device: dense (not
sparse) FLOP/s, bytes per second in one direction, and memory as the driver reports it, rounded
down. Real rates are lower, so times that follow from them are bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torchrec.distributed.planner import Topology

from embeddings.sharding import machine_topology

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
    """Figures of a device that differ from the data sheet; None keeps it."""

    memory_bytes: float | None = None  # for instance 4e10
    memory_bandwidth: float | None = None  # bytes/s
    fp32_flops: float | None = None  # FLOP/s
    bf16_flops: float | None = None
    node_bandwidth: float | None = None  # bytes/s between devices of a node
    network_bandwidth: float | None = None  # bytes/s per device to other nodes

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


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices, one rank per device.

    Example::

        cluster = Cluster(nodes=8, ranks_per_node=8, device=DEVICES["h100"])
        plan = plan_sharding(model, tables, device="cuda", topology=cluster.topology())
    """

    nodes: int
    ranks_per_node: int
    device: DeviceFigures

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("nodes", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"a cluster of {getattr(self, name)} {name}; give at least 1")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    def topology(self) -> Topology:
        """Describe the cluster for the planner, with the same reserve as on real machines."""
        device = self.device
        is_cpu = device.kind == "cpu"
        return machine_topology(
            self.world_size,
            self.ranks_per_node,
            torch.device(device.kind),
            device_memory_bytes=None if is_cpu else device.memory_bytes,
            host_memory_bytes=device.memory_bytes if is_cpu else device.host_memory_bytes,
        )

    def seconds_to_send(self, bytes_sent: float, spread: bool = True) -> float:
        """Return the least time in which each rank sends ``bytes_sent`` bytes to others.

        Args:
            bytes_sent: bytes that each rank sends.
            spread: equally to all other ranks, as an all_to_all does; False: along a ring, where
                all bytes pass its slowest link.
        """
        if self.world_size == 1:
            return 0.0
        device = self.device
        if not spread:
            slowest = device.network_bandwidth if self.nodes > 1 else device.node_bandwidth
            return bytes_sent / slowest
        outside = (self.world_size - self.ranks_per_node) / (self.world_size - 1)
        return max(
            bytes_sent * outside / device.network_bandwidth,
            bytes_sent * (1 - outside) / device.node_bandwidth,
        )
