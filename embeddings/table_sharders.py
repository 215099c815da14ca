"""TorchRec's sharders without data-parallel tables; initial weights do not depend on the plan.

Collectives may send vectors and gradients in 16 bits (DLRM, Yang et al. 2020).
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.shards_wrapper import LocalShardsWrapper
from torchrec.distributed.types import CommOp, ModuleSharder, QuantizedCommCodecs, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from embeddings.tables import NormalInitializer
from embeddings.torchrec_internals import look_up_as_bags

CommunicationType = Literal["fp32", "fp16", "bf16"]


class _TableSharder:
    """Mixin for one of TorchRec's sharders that sets sharding types and initial weights."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)  # type: ignore[misc]
        return sorted({*types, ShardingType.ROW_WISE.value} - {ShardingType.DATA_PARALLEL.value})

    def shard(
        self,
        module: EmbeddingBagCollection | EmbeddingCollection,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """Shard, then write the weights: those of ``module``, or initial ones if it is on meta."""
        is_pooled = isinstance(module, EmbeddingBagCollection)
        configs = module.embedding_bag_configs() if is_pooled else module.embedding_configs()
        initializers = {config.name: config.init_fn for config in configs}
        try:
            for config in configs:  # TorchRec calls `init_fn` without the shard's offsets
                config.init_fn = lambda weight: None
            sharded = super().shard(module, *arguments, **options)  # type: ignore[misc]
        finally:
            for config in configs:
                config.init_fn = initializers[config.name]
        if module.device.type != "meta":
            sharded.load_state_dict(module.state_dict())
            return sharded
        for name, tensor in sharded.state_dict().items():
            initializer = initializers[name.split(".")[-2]]
            assert isinstance(initializer, NormalInitializer), (name, initializer)
            for weight, (row_offset, column_offset) in _local_shards(tensor):
                initializer.fill(weight, row_offset, column_offset)
        return sharded


class BagSharder(_TableSharder, EmbeddingBagCollectionSharder):
    """Shards pooled tables."""


class SequenceSharder(_TableSharder, EmbeddingCollectionSharder):
    """Shards tables without pooling."""

    def shard(self, module: EmbeddingCollection, *arguments: Any, **options: Any) -> Any:
        sharded = super().shard(module, *arguments, **options)
        look_up_as_bags(sharded)
        return sharded


def sharders(
    forward: CommunicationType = "fp32", backward: CommunicationType = "fp32"
) -> list[ModuleSharder[nn.Module]]:
    """Return the sharders for the planner and for DistributedModelParallel; give both the same.

    Looked-up vectors travel between ranks as `forward`, their gradients as `backward`. Prefer bf16
    for gradients, which may be too small for fp16, below 6e-8. An unknown type is a ValueError.

    Example::

        from embeddings import sharders

        sharders("fp16", "bf16")  # vectors travel in fp16, their gradients in bf16
    """
    allowed = get_args(CommunicationType)
    for direction, name in (("forward", forward), ("backward", backward)):
        if name not in allowed:
            raise ValueError(
                f"communication {direction} is '{name}', which is no type that vectors can travel "
                f"in; choose one of {list(allowed)}"
            )
    codecs: dict[str, QuantizedCommCodecs] | None = None
    if not forward == backward == "fp32":
        types = QCommsConfig(CommType(forward), CommType(backward))
        codecs = {operation.name: get_qcomm_codecs(types) for operation in CommOp}
    sharder_types: tuple[Any, ...] = BagSharder, SequenceSharder
    return [sharder(qcomm_codecs_registry=codecs) for sharder in sharder_types]


def _local_shards(table: ShardedTensor | DTensor) -> Iterator[tuple[torch.Tensor, Sequence[int]]]:
    """Yield this rank's shards with their offsets; copies of tables are DTensors."""
    if isinstance(table, ShardedTensor):
        for shard in table.local_shards():
            yield shard.tensor, shard.metadata.shard_offsets
    else:
        local = cast(LocalShardsWrapper, table.to_local())
        # A rank without a shard may have offsets nevertheless, hence no strict zip.
        yield from zip(local.local_shards(), local.local_offsets(), strict=False)
