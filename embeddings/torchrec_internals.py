"""All private parts of TorchRec that the tables use, written for TorchRec 1.8.

`tests/embeddings/test_table_internals.py` shows which of them an upgrade has changed. On CPU,
unpooled lookups run as bags of one id each, which takes about 60 % of the time.
Shapes: T features, B batch, N ids of all features, D dimension.
"""

from collections.abc import Iterator
from itertools import accumulate, groupby, pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel

TORCHREC_VERSION = "1.8"


def table_kernels(model: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """Yield the FBGEMM modules that hold this rank's shards."""
    for collection in model.modules():
        for lookup in getattr(collection, "_lookups", []):
            for module in lookup.modules():
                if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
                    yield module


def unlock_cached_rows(model: nn.Module) -> None:
    """Make the rows in `uvm_caching` caches evictable; call it while no batch is in flight.

    A prefetched batch locks its rows until its backward pass, which validation does not have.
    """
    for kernel in table_kernels(model):
        locks = cast(Tensor, kernel.lxu_cache_locking_counter)
        if not locks.numel():
            continue
        # Another stream prefetches rows: wait for it, and let it start only after the reset.
        if locks.is_cuda:
            torch.cuda.synchronize(locks.device)
        locks.zero_()
        if locks.is_cuda:
            torch.cuda.synchronize(locks.device)


def copies_group(model: nn.Module) -> dist.ProcessGroup:
    """Return the process group whose rank numbers the plan of a model with copies uses."""
    group = cast(DistributedModelParallel, model)._env.process_group
    assert group is not None
    return group


def look_up_as_bags(collection: nn.Module) -> None:
    """Turn the CPU lookups of a sharded collection into `SingleIdBags`, in place."""
    for lookup in table_kernels(collection):
        if lookup.use_cpu:
            SingleIdBags.convert(lookup)


class SingleIdBags(SplitTableBatchedEmbeddingBagsCodegen):
    """An unpooled lookup of ids [N] with the kernels for bags; it returns [N, D]."""

    @staticmethod
    def convert(lookup: SplitTableBatchedEmbeddingBagsCodegen) -> None:
        """Change the class of a lookup to this one, in place; its weights keep their names."""
        assert lookup.pooling_mode == PoolingMode.NONE, lookup.pooling_mode
        assert len(set(lookup.feature_dims.tolist())) == 1, lookup.feature_dims
        lookup.pooling_mode = PoolingMode.SUM
        lookup.__class__ = SingleIdBags

    def forward(self, indices: Tensor, offsets: Tensor, **options: Any) -> Tensor:
        assert not any(value is not None for value in options.values()), options.keys()
        features_per_table = [len(list(group)) for _, group in groupby(self.feature_table_map)]
        edges = [0, *accumulate(features_per_table)]
        bounds = offsets[:: (len(offsets) - 1) // edges[-1]][edges].tolist()
        ids_by_table = [indices[start:end] for start, end in pairwise(bounds)]
        # Each feature of a table gets every count-th id, so the bags keep the order of the ids.
        ids = [
            table_ids[offset::count]
            for table_ids, count in zip(ids_by_table, features_per_table)
            for offset in range(count)
        ]
        counts = torch.tensor([len(feature_ids) for feature_ids in ids])
        # Each feature has the same number of bags; bags after its last id are empty.
        longest = max(int(counts.max()), 1)
        positions = torch.minimum(torch.arange(longest), counts.unsqueeze(1))
        positions += (counts.cumsum(0) - counts).unsqueeze(1)
        ends = torch.cat([positions.flatten(), counts.sum(dim=0, keepdim=True)])
        bags = super().forward(torch.cat(ids), ends)  # [longest, T * D]
        widths = [count * self.max_D for count in features_per_table]
        bags_by_table = bags.split(widths, dim=1) if len(widths) > 1 else [bags]
        vectors = []
        for table_bags, table_ids in zip(bags_by_table, ids_by_table):
            rows = table_bags.reshape(-1, self.max_D)
            # Slicing, even of all rows, would copy the gradient in backward.
            vectors.append(rows if len(rows) == len(table_ids) else rows[: len(table_ids)])
        return vectors[0] if len(vectors) == 1 else torch.cat(vectors)
