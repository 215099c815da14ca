"""A simulated cluster: the planner's view of devices that this machine does not have.

TorchRec's planner needs memory sizes, not devices, so tables for thousands of GPUs can be
planned on a laptop. Times computed from the devices' public figures are lower bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchrec.distributed.planner import Topology

from embeddings.device_figures import DeviceFigures
from embeddings.sharding import machine_topology


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

    def topology(self, copies: int = 1) -> Topology:
        """Describe the cluster for the planner: the ranks that share one copy of tables."""
        device = self.device
        is_cpu = device.kind == "cpu"
        return machine_topology(
            self.world_size // copies,
            max(self.ranks_per_node // copies, 1),
            torch.device(device.kind),
            device_memory_bytes=None if is_cpu else device.memory_bytes,
            host_memory_bytes=device.memory_bytes if is_cpu else device.host_memory_bytes,
        )

    def seconds_to_send(self, bytes_sent: float, spread: bool = True) -> float:
        """Return the least seconds in which each rank sends ``bytes_sent`` bytes to others.

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
