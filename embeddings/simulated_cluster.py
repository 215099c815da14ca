"""Simulated clusters: a laptop plans tables for devices that it does not have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torchrec.distributed.planner import Topology

from embeddings.hardware import Hardware, hardware_of
from embeddings.sharding import machine_topology

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One device of a rank, and its share of the host's memory."""

    name: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: int  # memory for tables: of the GPU, or of the host for a CPU
    host_memory_bytes: int = 128 * GIB
    hardware: Hardware = field(default_factory=Hardware)


# Memory as the driver reports it, rounded down, in the makers' eight-GPU machines.
DEVICES = {
    device.name: device
    for device in (
        Device("a100", "cuda", 79 * GIB, hardware=hardware_of("a100")),
        Device("h100", "cuda", 79 * GIB, 256 * GIB, hardware_of("h100")),
        Device("h200", "cuda", 139 * GIB, 256 * GIB, hardware_of("h200")),
        Device("b200", "cuda", 178 * GIB, 256 * GIB, hardware_of("b200")),
    )
}


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices, one rank per device."""

    nodes: int
    ranks_per_node: int
    device: Device

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def topology(self, copies: int = 1) -> Topology:
        """Return the topology of the ranks that share one of the copies of the tables."""
        device = self.device
        is_cpu = device.kind == "cpu"
        return machine_topology(
            self.world_size // copies,
            max(self.ranks_per_node // copies, 1),
            torch.device(device.kind),
            device_memory_bytes=None if is_cpu else device.memory_bytes,
            host_memory_bytes=device.memory_bytes if is_cpu else device.host_memory_bytes,
            hardware=device.hardware,
        )
