"""The tables of a sharded model as tensors that can be read and written in place.

TorchRec's `state_dict` does not suffice in two cases. The rows of a table of kernel `uvm_caching`
may be newer in the cache of the device than in host memory, and a write to host memory does not
reach the cache. A model with several copies of its tables has DTensors, which know the shards of
this rank alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.shards_wrapper import LocalShardsWrapper
from torchrec.distributed.types import EmbeddingModuleShardingPlan


def current_state(model: DistributedModelParallel) -> dict[str, Any]:
    """Return the model's `state_dict`, tables as ShardedTensors that share memory with the model.

    Rows in a cache are written back and leave it. So the tensors are current, and what is written
    to them before the next step takes effect.
    """
    state = model.state_dict()  # TorchRec writes cached rows back
    for kernel in table_kernels(model):
        kernel.reset_cache_states()
    copied = {name: value for name, value in state.items() if isinstance(value, DTensor)}
    if copied:
        shards = _shards_by_table(model)
        for name, value in copied.items():
            state[name] = _as_sharded_tensor(value, shards[name.split(".")[-2]], model)
    return state


def table_kernels(model: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """Yield the modules of FBGEMM that hold the shards of this rank.

    TorchRec keeps its lookups in a plain list, which `model.modules()` does not visit.
    """
    for collection in model.modules():
        for lookup in getattr(collection, "_lookups", []):
            for module in lookup.modules():
                if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
                    yield module


def local_tensors(value: ShardedTensor | DTensor) -> list[Tensor]:
    """Return the shards on this rank, in the order of their offsets in the plan."""
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    return cast(LocalShardsWrapper, value.to_local()).local_shards()


def _shards_by_table(model: DistributedModelParallel) -> dict[str, list[Any]]:
    """Return the metadata of all shards of each table, in the copy that this rank has a part of."""
    found: dict[str, list[Any]] = {}
    for module_plan in model.plan.plan.values():
        assert isinstance(module_plan, EmbeddingModuleShardingPlan)
        for table, sharding in module_plan.items():
            found[table] = sharding.sharding_spec.shards  # type: ignore[union-attr]
    return found


def _as_sharded_tensor(
    value: DTensor, shards: list[Any], model: DistributedModelParallel
) -> ShardedTensor:
    """Return a table as its copy on some of the ranks, which are named by their number in the job.

    All copies are equal once they were averaged, so that each rank may save its own as the table.
    """
    group = model._env.process_group
    here = [shard for shard in shards if shard.placement.rank() == dist.get_rank(group)]
    tensors = local_tensors(value)
    assert [list(tensor.shape) for tensor in tensors] == [shard.shard_sizes for shard in here]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        [Shard(tensor, shard) for tensor, shard in zip(tensors, here, strict=True)],
        ShardedTensorMetadata(shards, value.shape, TensorProperties(dtype=value.dtype)),
        process_group=group,
    )
