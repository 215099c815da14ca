"""On CPU, tables without pooling are looked up as bags of one id each.

The numbers are the same, but FBGEMM's kernels for bags update 10,000 rows on CPU in a tenth of the
time that those without pooling take. On CUDA nothing is changed.

Shapes: T features, B batch, N ids of all features, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection


def look_up_as_bags(collection: ShardedEmbeddingCollection) -> None:
    """Changes the CPU lookups of a sharded collection in place."""
    lookups: list[nn.Module] = collection._lookups
    for lookup in lookups:
        for module in lookup.modules():
            if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen) and module.use_cpu:
                make_bags(module)


def make_bags(module: SplitTableBatchedEmbeddingBagsCodegen) -> None:
    """Gives a module without pooling the kernels for bags; its results stay [N, D]."""
    assert module.pooling_mode == PoolingMode.NONE and len(set(module.feature_dims.tolist())) == 1
    module.pooling_mode = PoolingMode.SUM
    module.forward = partial(_look_up, module, module.forward)


def _look_up(
    module: SplitTableBatchedEmbeddingBagsCodegen,
    look_up_bags: Callable[..., Tensor],
    indices: Tensor,  # [N]
    offsets: Tensor,  # [T * B + 1]
    **more: Any,
) -> Tensor:  # [N, D]
    assert not any(value is not None for value in more.values()), more.keys()
    num_features = len(module.feature_table_map)
    batch = (len(offsets) - 1) // num_features
    bounds = offsets[::batch]  # [T + 1], of each feature's ids
    counts = bounds.diff()
    # As many bags for each feature, those behind its ids empty.
    most = max(int(counts.max()), 1)
    places = torch.minimum(torch.arange(most), counts.unsqueeze(1)) + bounds[:-1].unsqueeze(1)
    bags = look_up_bags(indices, torch.cat([places.flatten(), bounds[-1:]]))  # [most, T * D]
    parts = bags.chunk(num_features, dim=1)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist())])
