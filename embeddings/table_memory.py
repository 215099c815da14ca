"""Bytes of a table's weights and optimizer state on each rank."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from torchrec.distributed.types import ShardingPlan

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
        weights = FLOAT * sum(rows * columns for rows, columns in sizes)
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
    weights = FLOAT * rows * columns
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


def table_memory(table: TableConfig, plan: ShardingPlan) -> TableMemory:
    """Describe how a plan shards a table."""
    sharding = planned_sharding(plan, table.name)
    shards = [
        PlannedShard(piece.placement.rank(), *piece.shard_sizes)
        for piece in sharding.sharding_spec.shards  # type: ignore[union-attr]
    ]
    return TableMemory(table, sharding.sharding_type, sharding.compute_kernel, shards)
