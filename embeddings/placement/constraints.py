"""Constraints of TorchRec's planner for each table: sharding, memory of the rows, their cache."""

from __future__ import annotations

import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import CacheParams, ShardingType

from embeddings.tables import Kernel, TableConfig

# The planner makes no column shards narrower than this: every shard looks up all ids.
MIN_COLUMNS = 32

KERNELS: dict[Kernel, EmbeddingComputeKernel] = {
    "fused": EmbeddingComputeKernel.FUSED,
    "uvm": EmbeddingComputeKernel.FUSED_UVM,
    "uvm_caching": EmbeddingComputeKernel.FUSED_UVM_CACHING,
}


def constraints(table: TableConfig, world_size: int, prefetch: bool) -> ParameterConstraints:
    """Return the constraints of one table, for the ranks that share one copy of it.

    One rank holds whole tables: TorchRec's planner might split them by rows, for the same bytes,
    and each step would sort all ids into its only bucket.
    """
    cache = None
    sharding_types = None if table.sharding == "auto" else [table.sharding]
    if sharding_types is None and world_size == 1:
        sharding_types = [ShardingType.TABLE_WISE.value]
    if table.kernel == "uvm_caching":
        cache = CacheParams(load_factor=table.cache_load_factor, prefetch_pipeline=prefetch)
    return ParameterConstraints(
        sharding_types=sharding_types,
        compute_kernels=[KERNELS[table.kernel].value],
        cache_params=cache,
        min_partition=_column_shard_width(
            table.embedding_dim, world_size, MIN_COLUMNS if table.sharding == "auto" else 1
        ),
        # At least 1: with an estimated load of 0 the planner would put the table anywhere.
        pooling_factors=[max(table.ids_per_row.get(name, 1.0), 1.0) for name in table.features],
    )


def _column_shard_width(dim: int, world_size: int, min_columns: int) -> int:
    """Return the width of equal column shards, as many as possible up to one per rank.

    The kernels need a multiple of 4.
    """
    for shards in range(world_size, 1, -1):
        width = dim // shards
        if dim % shards == 0 and width % 4 == 0 and width >= min_columns:
            return width
    return dim


def check_kernels(table: TableConfig, device: torch.device) -> None:
    """Check that the device has the fused kernel of a table.

    Raises:
        ValueError: the table needs a GPU, and `device` is a CPU.
    """
    if device.type != "cpu":
        return
    if table.kernel != "fused":
        raise ValueError(
            f"table '{table.name}': kernel '{table.kernel}' needs CUDA, as a CPU has no memory "
            "apart from the host's; set it to 'fused'"
        )
    if table.optimizer == "adam" and not table.frozen:
        raise ValueError(
            f"table '{table.name}': the fused kernel of optimizer 'adam' needs CUDA; choose "
            "'rowwise_adagrad', 'adagrad' or 'sgd' on CPU"
        )
    if table.weight_decay > 0 and not table.frozen:
        raise ValueError(
            f"table '{table.name}': weight_decay {table.weight_decay} needs CUDA, the fused "
            "kernels on CPU ignore it; set it to 0"
        )
