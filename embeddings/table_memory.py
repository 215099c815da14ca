"""Bytes of a table's weights and optimizer state on each rank, and how to make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, NamedTuple

from torchrec.distributed.types import ShardingPlan

from embeddings.hardware import RESERVED_SHARE
from embeddings.table_state import planned_sharding
from embeddings.tables import TableConfig

FLOAT = 4  # bytes
# FBGEMM's cache keeps an int32 per row of the table and two int64 per row of the cache.
CACHE_INDEX_BYTES, CACHE_SLOT_BYTES = 4, 16


class PlannedShard(NamedTuple):
    """A piece of a table."""

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

    def on_rank(self, rank: int) -> tuple[int, int]:
        """Return bytes of weights and of optimizer state on a rank."""
        sizes = self._sizes(rank)
        weights = self.table.bytes_of_weight * sum(rows * columns for rows, columns in sizes)
        return weights, sum(state_bytes(self.table, *size) for size in sizes)

    def on_device_of(self, rank: int) -> int:
        return sum(device_bytes(self.table, *size) for size in self._sizes(rank))

    def _sizes(self, rank: int) -> list[tuple[int, int]]:
        return [(shard.rows, shard.columns) for shard in self.shards if shard.rank == rank]

    def on_host_of(self, rank: int) -> int:
        """Return the bytes in host memory beside a rank's GPU."""
        return 0 if self.table.kernel == "fused" else sum(self.on_rank(rank))


def device_bytes(table: TableConfig, rows: int, columns: int) -> int:
    """Return the bytes that a piece of a table takes of the device's memory."""
    if table.kernel == "uvm":
        return 0
    weights = table.bytes_of_weight * rows * columns
    if table.kernel == "fused":
        return weights + state_bytes(table, rows, columns)
    share = table.cache_load_factor
    return ceil(weights * share + rows * (CACHE_INDEX_BYTES + CACHE_SLOT_BYTES * share))


def state_bytes(table: TableConfig, rows: int, columns: int) -> int:
    """Return the bytes that the fused optimizer keeps for a piece of a table."""
    if table.frozen or table.optimizer == "sgd":
        return 0
    per_row = {"rowwise_adagrad": 1, "adagrad": columns, "adam": 2 * columns}[table.optimizer]
    return FLOAT * rows * per_row


def table_bytes(table: TableConfig) -> int:
    """Return the bytes of weights and optimizer state of an unsharded table."""
    rows, dim = table.num_embeddings, table.embedding_dim
    return table.bytes_of_weight * rows * dim + state_bytes(table, rows, dim)


def _on_devices(table: TableConfig) -> int:
    """Return the bytes that an unsharded table takes of the devices' memory."""
    return device_bytes(table, table.num_embeddings, table.embedding_dim)


def table_memory(table: TableConfig, plan: ShardingPlan) -> TableMemory:
    """Describe how a plan shards a table."""
    sharding = planned_sharding(plan, table.name)
    shards = [
        PlannedShard(piece.placement.rank(), *piece.shard_sizes)
        for piece in sharding.sharding_spec.shards
    ]
    return TableMemory(table, sharding.sharding_type, sharding.compute_kernel, shards)


def what_does_not_fit(
    tables: Sequence[TableConfig],
    bytes_per_rank: int,
    world_size: int,
    host_bytes: int = 0,
    reserved_share: float = RESERVED_SHARE,
) -> list[str]:
    """List the tables that do not fit, the largest first, and changes that would make all fit.

    `world_size` ranks share one copy of the tables; `host_bytes` per rank are beside a GPU.
    """
    room = int(bytes_per_rank * (1 - reserved_share))
    total = sum(map(_on_devices, tables))
    lines = []
    for table in sorted(tables, key=_on_devices, reverse=True):
        size, pieces = _on_devices(table), _most_pieces(table, world_size)
        if size > pieces * room:
            where = "one rank" if pieces == 1 else f"{pieces:,} ranks"
            lines.append(
                f"table '{table.name}' ({table.num_embeddings:,} x {table.embedding_dim}, "
                f"{table.optimizer}, {table.sharding}) takes {size:,} bytes; {where} can hold "
                f"{pieces * room:,}"
            )
    if total > world_size * room and len(tables) > 1:
        lines.append(f"all tables take {total:,} bytes; the ranks can hold {world_size * room:,}")
    fixes = _fixes(tables, room, world_size, host_bytes)
    return lines + [f"enough would be: {fix}" for fix in fixes]


def _most_pieces(table: TableConfig, world_size: int) -> int:
    if table.sharding == "table_wise":
        return 1
    if table.sharding == "column_wise":
        return min(world_size, table.embedding_dim // 4)
    return world_size


def _fixes(tables: Sequence[TableConfig], room: int, world_size: int, host_bytes: int) -> list[str]:
    """List changes, each of which alone makes all tables fit."""
    largest = max(tables, key=_on_devices)
    name, other_bytes = largest.name, sum(map(_on_devices, tables)) - _on_devices(largest)
    fixes = []
    if _fit(tables, room, world_size):
        return []
    ranks = -(-(other_bytes + _on_devices(largest)) // room)
    if _fit(tables, room, ranks):
        fixes.append(f"{ranks:,} ranks")
    if largest.sharding in ("table_wise", "column_wise"):
        fixes += _if_fits(tables, largest, room, world_size, sharding="row_wise")
    if largest.optimizer in ("adam", "adagrad"):
        fixes += _if_fits(tables, largest, room, world_size, optimizer="rowwise_adagrad")
    if largest.precision == "fp32":
        fixes += _if_fits(tables, largest, room, world_size, precision="fp16")
    on_host = sum(table_bytes(t) for t in tables if t is largest or t.kernel != "fused")
    if largest.kernel == "fused" and on_host <= world_size * host_bytes:
        fixes += _if_fits(tables, largest, room, world_size, kernel="uvm_caching")
    room_left = _most_pieces(largest, world_size) * room
    room_left = min(room_left, world_size * room - other_bytes)
    for dim in range(largest.embedding_dim // 4 * 4, 0, -4):
        if _on_devices(replace(largest, embedding_dim=dim)) <= room_left:
            fixes.append(f"embedding_dim {dim} for table '{name}'")
            break
    rows = room_left * largest.num_embeddings // _on_devices(largest)
    if rows > 0:
        fixes.append(f"num_embeddings {rows:,} for table '{name}'")
    return fixes


def _if_fits(
    tables: Sequence[TableConfig], table: TableConfig, room: int, world_size: int, **change: Any
) -> list[str]:
    after = [replace(part, **change) if part is table else part for part in tables]
    words = ", ".join(f"{field} '{value}'" for field, value in change.items())
    return [f"{words} for table '{table.name}'"] if _fit(after, room, world_size) else []


def _fit(tables: Sequence[TableConfig], room: int, world_size: int) -> bool:
    sizes = [(_on_devices(table), _most_pieces(table, world_size)) for table in tables]
    total = sum(size for size, _ in sizes)
    return total <= world_size * room and all(size <= pieces * room for size, pieces in sizes)
