"""Lookup of tables without pooling as bags of one id each, on CPU.

The results are the same, but FBGEMM's CPU kernels for bags update 10,000 rows (of 100,000 x 32, one
thread, row-wise Adagrad) in 15 to 20 ms, and its kernels without pooling in 25 to 31 ms. On CUDA
nothing changes. The lookups print as `SingleIdBags`.

Shapes: T features, B batch, N ids of all features, D dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection

from embeddings.placement.current_state import table_kernels


class SingleIdBags(SplitTableBatchedEmbeddingBagsCodegen):
    """A lookup without pooling, by the kernels for bags; its results stay [N, D].

    Example::

        SingleIdBags.take_over(lookup)  # a lookup with PoolingMode.NONE
        vectors = lookup(indices, offsets)
    """

    @staticmethod
    def take_over(lookup: SplitTableBatchedEmbeddingBagsCodegen) -> None:
        """Change the class of a lookup to this one, in place; its weights keep their names."""
        assert lookup.pooling_mode == PoolingMode.NONE, lookup.pooling_mode
        assert len(set(lookup.feature_dims.tolist())) == 1, lookup.feature_dims
        lookup.pooling_mode = PoolingMode.SUM
        lookup.__class__ = SingleIdBags

    def forward(  # type: ignore[override]
        self,
        indices: Tensor,  # [N]
        offsets: Tensor,  # [T * B + 1]
        **more: Any,
    ) -> Tensor:  # [N, D]
        """Look up the vectors of the ids, in their order."""
        assert not any(value is not None for value in more.values()), more.keys()
        num_features = len(self.feature_table_map)
        batch = (len(offsets) - 1) // num_features
        bounds = offsets[::batch]  # [T + 1], offsets of each feature's ids
        counts = bounds.diff()
        # The same number of bags for each feature; those after its last id are empty.
        most = max(int(counts.max()), 1)
        places = torch.minimum(torch.arange(most), counts.unsqueeze(1)) + bounds[:-1].unsqueeze(1)
        bags = super().forward(indices, torch.cat([places.flatten(), bounds[-1:]]))  # [most, T * D]
        parts = bags.chunk(num_features, dim=1)
        return torch.cat([part[:count] for part, count in zip(parts, counts.tolist())])


def look_up_as_bags(collection: ShardedEmbeddingCollection) -> None:
    """Change the CPU lookups of a sharded collection in place."""
    for lookup in table_kernels(collection):
        if lookup.use_cpu:
            SingleIdBags.take_over(lookup)
