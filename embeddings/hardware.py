"""Bandwidths of GPUs and their links, simulated clusters of them, and the tables' time in a step.

A laptop can so plan tables for devices that it does not have. Figures are those of NVIDIA's data
sheets, in one direction, unless settings give others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import nn
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import HardwareConfig, ShardingOption
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from embeddings.sharding import constraints, machine_topology
from embeddings.table_memory import table_memory
from embeddings.tables import TableConfig

# Share of memory left to the dense model, activations and batches. TorchRec's heuristic would
# count frozen parameters, too, six times.
RESERVED_SHARE = 0.15

GB = 10**9 / 1000  # bytes a millisecond, TorchRec's unit


@dataclass(frozen=True)
class Hardware:
    """Bandwidths in GB a second, each None where TorchRec's default is taken."""

    memory: float | None = None  # of the device
    host_link: float | None = None  # from the host's memory to the device
    intra_node: float | None = None  # between devices of a node
    inter_node: float | None = None  # between nodes, per device
    reserved_share: float = RESERVED_SHARE

    def or_else(self, other: Hardware) -> Hardware:
        """Return these figures, and those of `other` where one is None."""
        names = "memory", "host_link", "intra_node", "inter_node"
        chosen = {name: getattr(self, name) or getattr(other, name) for name in names}
        return replace(self, **chosen)

    @property
    def is_unknown(self) -> bool:
        return self.memory is None

    def config(self, device_bytes: int | None, host_bytes: int) -> HardwareConfig:
        """Return TorchRec's form of the figures."""
        figures = {
            "hbm_mem_bw": self.memory,
            "hbm_to_ddr_mem_bw": self.host_link,
            "intra_host_bw": self.intra_node,
            "inter_host_bw": self.inter_node,
        }
        return HardwareConfig(
            hbm_cap_bytes=device_bytes,
            ddr_cap_bytes=host_bytes,
            **{name: figure * GB for name, figure in figures.items() if figure},  # type: ignore[arg-type]
        )


class _Card(NamedTuple):
    memory: float
    host_link: float
    nvlink: float | None = None  # None: devices of a node exchange over the host link


CARDS = {
    "a100": _Card(2039, 32, 300),
    "a100-40gb": _Card(1555, 32, 300),
    "a100-pcie": _Card(1935, 32),
    "h100": _Card(3350, 64, 450),
    "h100-pcie": _Card(2039, 64),
    "h100-nvl": _Card(3938, 64),  # bridges join two cards alone
    "h200": _Card(4800, 64, 450),
    "h200-nvl": _Card(4800, 64),
    "gh200": _Card(4000, 450, 450),
    "b200": _Card(8000, 64, 900),
    "gb200": _Card(8000, 450, 900),
    "l4": _Card(300, 32),
    "l40s": _Card(864, 32),
    "a10": _Card(600, 32),
}


def hardware_of(name: str) -> Hardware:
    """Return the figures of a GPU by the driver's name; of an unknown one, none.

    Example::

        from embeddings.hardware import hardware_of

        hardware_of("NVIDIA H100 80GB HBM3").intra_node  # 450, of NVLink
        hardware_of("NVIDIA H100 PCIe").intra_node  # 64: it has no NVLink
        hardware_of("NVIDIA GH200 480GB").memory  # 4000: it is no H200
        hardware_of("NVIDIA Z900").is_unknown  # True
    """
    words = re.split(r"[\s-]+", name.lower())
    models = [word for word in words if word in CARDS]
    if not models:
        return Hardware()
    variants = [f"{models[0]}-{word}" for word in ("pcie", "nvl", "40gb") if word in words]
    card = next((CARDS[variant] for variant in variants if variant in CARDS), CARDS[models[0]])
    return Hardware(card.memory, card.host_link, card.nvlink or card.host_link)


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
