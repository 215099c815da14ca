"""Simulated clusters, and the time that TorchRec expects of the tables in a step there.

A laptop can so plan tables for devices that it does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import nn
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from embeddings.hardware import Hardware, hardware_of
from embeddings.sharding import constraints, machine_topology
from embeddings.table_memory import table_memory
from embeddings.tables import TableConfig

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


class RankTime(NamedTuple):
    """Milliseconds of a step: lookups, updates and exchanges, and those over the host link."""

    total: float
    host_link: float


def slowest_rank(
    module: nn.Module,
    tables: Sequence[TableConfig],
    plan: ShardingPlan,
    topology: Topology,
    module_sharders: list[ModuleSharder[nn.Module]],
    batch_size: int = 512,
    prefetch: bool = False,
) -> RankTime:
    """Return the times of the rank that takes longest: all ranks wait for it."""
    limits = {table.name: constraints(table, topology.world_size, prefetch) for table in tables}
    options = EmbeddingEnumerator(topology, batch_size, limits).enumerate(module, module_sharders)
    times = [[0.0, 0.0] for _ in range(topology.world_size)]
    for table in tables:
        memory = table_memory(table, plan)
        sizes = [[shard.rows, shard.columns] for shard in memory.shards]
        option = next(o for o in options if _is_planned(o, table, memory.sharding, sizes))
        for place, shard in zip(memory.shards, option.shards, strict=True):
            assert shard.perf is not None
            times[place.rank][0] += shard.perf.total
            if table.kernel != "fused":
                work = shard.perf.fwd_compute + shard.perf.bwd_compute + shard.perf.prefetch_compute
                times[place.rank][1] += work
    return max(RankTime(*rank) for rank in times)


def _is_planned(
    option: ShardingOption, table: TableConfig, sharding: str, sizes: list[list[int]]
) -> bool:
    return (
        option.name == table.name
        and option.sharding_type == sharding
        and [list(shard.size) for shard in option.shards] == sizes
    )
