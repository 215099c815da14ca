"""The time that TorchRec expects of the tables in a step under a plan, rank by rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from embeddings.sharding import constraints
from embeddings.table_memory import table_memory
from embeddings.tables import TableConfig


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
