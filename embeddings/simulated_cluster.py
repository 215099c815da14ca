"""Memory of tables on each rank, changes that make them fit, and step times on simulated clusters.

With it a laptop can plan tables for devices that it does not have.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from embeddings.hardware import RESERVED_SHARE, Hardware, find_hardware
from embeddings.sharding import constraints, machine_topology
from embeddings.table_state import planned_sharding
from embeddings.tables import TableConfig

GIB = 2**30
FLOAT = 4  # bytes
# FBGEMM's cache stores an int32 per row of the table and two int64 per row of the cache.
CACHE_INDEX_BYTES, CACHE_SLOT_BYTES = 4, 16


class PlannedShard(NamedTuple):
    """The rank and the size of one shard of a table."""

    rank: int
    rows: int
    columns: int


@dataclass(frozen=True)
class TableMemory:
    """The shards of a table in a plan."""

    table: TableConfig
    sharding: str
    kernel: str
    shards: list[PlannedShard]

    def bytes_on_rank(self, rank: int) -> tuple[int, int]:
        """Return a rank's bytes of weights and of optimizer state."""
        sizes = self._sizes(rank)
        weights = self.table.bytes_of_weight * sum(rows * columns for rows, columns in sizes)
        return weights, sum(state_bytes(self.table, *size) for size in sizes)

    def bytes_on_device(self, rank: int) -> int:
        return sum(device_bytes(self.table, *size) for size in self._sizes(rank))

    def bytes_on_host(self, rank: int) -> int:
        """Return the bytes that a rank with a GPU holds in host memory."""
        return 0 if self.table.kernel == "fused" else sum(self.bytes_on_rank(rank))

    def _sizes(self, rank: int) -> list[tuple[int, int]]:
        return [(shard.rows, shard.columns) for shard in self.shards if shard.rank == rank]


def device_bytes(table: TableConfig, rows: int, columns: int) -> int:
    """Return the bytes of device memory that a shard of a table takes."""
    if table.kernel == "uvm":
        return 0
    weights = table.bytes_of_weight * rows * columns
    if table.kernel == "fused":
        return weights + state_bytes(table, rows, columns)
    share = table.cache_load_factor
    return ceil(weights * share + rows * (CACHE_INDEX_BYTES + CACHE_SLOT_BYTES * share))


def state_bytes(table: TableConfig, rows: int, columns: int) -> int:
    """Return the bytes of the fused optimizer's state for a shard of a table."""
    if table.frozen or table.optimizer == "sgd":
        return 0
    per_row = {"rowwise_adagrad": 1, "adagrad": columns, "adam": 2 * columns}[table.optimizer]
    return FLOAT * rows * per_row


def table_bytes(table: TableConfig) -> int:
    """Return the bytes of weights and optimizer state of an unsharded table."""
    rows, dim = table.num_embeddings, table.embedding_dim
    return table.bytes_of_weight * rows * dim + state_bytes(table, rows, dim)


def _on_devices(table: TableConfig) -> int:
    return device_bytes(table, table.num_embeddings, table.embedding_dim)


def table_memory(table: TableConfig, plan: ShardingPlan) -> TableMemory:
    """Describe how a plan shards a table."""
    sharding = planned_sharding(plan, table.name)
    specs = sharding.sharding_spec.shards
    shards = [PlannedShard(spec.placement.rank(), *spec.shard_sizes) for spec in specs]
    return TableMemory(table, sharding.sharding_type, sharding.compute_kernel, shards)


def memory_problems(
    tables: Sequence[TableConfig],
    bytes_per_rank: int,
    world_size: int,
    host_bytes: int = 0,
    reserved_share: float = RESERVED_SHARE,
) -> list[str]:
    """List the tables that do not fit, the largest first, and changes that would make all fit.

    `world_size` ranks share one copy of the tables; a rank with a GPU also has `host_bytes`.
    """
    room = int(bytes_per_rank * (1 - reserved_share))
    total = sum(map(_on_devices, tables))
    lines = []
    for table in sorted(tables, key=_on_devices, reverse=True):
        size, num_shards = _on_devices(table), _max_shards(table, world_size)
        if size > num_shards * room:
            where = "one rank" if num_shards == 1 else f"{num_shards:,} ranks"
            lines.append(
                f"table '{table.name}' ({table.num_embeddings:,} x {table.embedding_dim}, "
                f"{table.optimizer}, {table.sharding}) takes {size:,} bytes; {where} can hold "
                f"{num_shards * room:,}"
            )
    if total > world_size * room and len(tables) > 1:
        lines.append(f"all tables take {total:,} bytes; the ranks can hold {world_size * room:,}")
    fixes = _fixes(tables, room, world_size, host_bytes)
    return lines + [f"enough would be: {fix}" for fix in fixes]


def _max_shards(table: TableConfig, world_size: int) -> int:
    if table.sharding == "table_wise":
        return 1
    if table.sharding == "column_wise":
        return min(world_size, table.embedding_dim // 4)
    return world_size


def _fixes(tables: Sequence[TableConfig], room: int, world_size: int, host_bytes: int) -> list[str]:
    """List changes, each of which alone makes all tables fit."""
    if _fit(tables, room, world_size):
        return []
    largest, total = max(tables, key=_on_devices), sum(map(_on_devices, tables))
    changes: dict[str, Any] = {}
    if largest.sharding in ("table_wise", "column_wise"):
        changes["sharding"] = "row_wise"
    if largest.optimizer in ("adam", "adagrad"):
        changes["optimizer"] = "rowwise_adagrad"
    if largest.precision == "fp32":
        changes["precision"] = "fp16"
    on_host = sum(table_bytes(t) for t in tables if t is largest or t.kernel != "fused")
    if largest.kernel == "fused" and on_host <= world_size * host_bytes:
        changes["kernel"] = "uvm_caching"
    where, ranks = f"for table '{largest.name}'", -(-total // room)
    fixes = [f"{ranks:,} ranks"] if _fit(tables, room, ranks) else []
    for name, value in changes.items():
        tried = [replace(table, **{name: value}) if table is largest else table for table in tables]
        if _fit(tried, room, world_size):
            fixes.append(f"{name} '{value}' {where}")
    room_left = world_size * room - (total - _on_devices(largest))
    room_left = min(room_left, _max_shards(largest, world_size) * room)
    for dim in range(largest.embedding_dim // 4 * 4, 0, -4):
        if _on_devices(replace(largest, embedding_dim=dim)) <= room_left:
            fixes.append(f"embedding_dim {dim} {where}")
            break
    if (rows := room_left * largest.num_embeddings // _on_devices(largest)) > 0:
        fixes.append(f"num_embeddings {rows:,} {where}")
    return fixes


def _fit(tables: Sequence[TableConfig], room: int, world_size: int) -> bool:
    sizes = [(_on_devices(table), _max_shards(table, world_size)) for table in tables]
    total = sum(size for size, _ in sizes)
    return total <= world_size * room and all(size <= count * room for size, count in sizes)


@dataclass(frozen=True)
class Device:
    """The device of one rank, and the rank's share of the host's memory."""

    name: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: int  # memory for tables: of the GPU, or of the host for a CPU
    host_memory_bytes: int = 128 * GIB
    hardware: Hardware = field(default_factory=Hardware)


# Memory that the driver reports, rounded down, in the manufacturers' eight-GPU machines.
DEVICES = {
    "a100": Device("a100", "cuda", 79 * GIB, 128 * GIB, find_hardware("a100")),
    "h100": Device("h100", "cuda", 79 * GIB, 256 * GIB, find_hardware("h100")),
    "h200": Device("h200", "cuda", 139 * GIB, 256 * GIB, find_hardware("h200")),
    "b200": Device("b200", "cuda", 178 * GIB, 256 * GIB, find_hardware("b200")),
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
        device, is_cpu = self.device, self.device.kind == "cpu"
        return machine_topology(
            self.world_size // copies,
            max(self.ranks_per_node // copies, 1),
            torch.device(device.kind),
            device_memory_bytes=None if is_cpu else device.memory_bytes,
            host_memory_bytes=device.memory_bytes if is_cpu else device.host_memory_bytes,
            hardware=device.hardware,
        )


class RankTime(NamedTuple):
    """A rank's estimated milliseconds of embedding work in one step."""

    total: float  # lookups, updates and exchanges
    host_link: float  # of these, lookups and updates of rows in host memory


def slowest_rank(
    module: nn.Module,
    tables: Sequence[TableConfig],
    plan: ShardingPlan,
    topology: Topology,
    module_sharders: list[ModuleSharder[nn.Module]],
    batch_size: int = 512,
    prefetch: bool = False,
) -> RankTime:
    """Return the times of the slowest rank, for which all others wait."""
    limits = {table.name: constraints(table, topology.world_size, prefetch) for table in tables}
    options = EmbeddingEnumerator(topology, batch_size, limits).enumerate(module, module_sharders)
    times = [[0.0, 0.0] for _ in range(topology.world_size)]
    for table in tables:
        memory = table_memory(table, plan)
        sizes = [[shard.rows, shard.columns] for shard in memory.shards]
        option = next(
            option
            for option in options
            if (option.name, option.sharding_type) == (table.name, memory.sharding)
            and [list(shard.size) for shard in option.shards] == sizes
        )
        for planned, shard in zip(memory.shards, option.shards, strict=True):
            assert shard.perf is not None
            times[planned.rank][0] += shard.perf.total
            if table.kernel != "fused":
                work = shard.perf.fwd_compute + shard.perf.bwd_compute + shard.perf.prefetch_compute
                times[planned.rank][1] += work
    return max(RankTime(*rank) for rank in times)
