"""Private parts of TorchRec and FBGEMM: which have changed, and lookups as bags of one id.

The reference of the bags are FBGEMM's own kernels for lookups without pooling.
"""

import inspect
from importlib.metadata import version
from itertools import chain
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.torchrec_internals import TORCHREC_VERSION, SingleIdBags

ROWS, DIM, BATCH = (7, 5), 4, 3
# Of three features, two on the first table: ids of each, and lengths of each by row of the batch.
BATCHES = {
    "repeated ids": ([[1, 6, 1], [1, 0, 3, 3, 1], [4, 0]], [[1, 1, 1], [5, 0, 0], [0, 2, 0]]),
    "a feature without ids": ([[1, 2, 3], [], [4]], [[1, 1, 1], [0, 0, 0], [1, 0, 0]]),
    "no ids": ([[], [], []], [[0, 0, 0]] * 3),
}


def lookup(optimizer: EmbOptimType) -> SplitTableBatchedEmbeddingBagsCodegen:
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in ROWS],
        feature_table_map=[0, 0, 1],
        pooling_mode=PoolingMode.NONE,
        optimizer=optimizer,
        learning_rate=0.1,
    )
    for index, weights in enumerate(module.split_embedding_weights()):
        weights.normal_(generator=torch.Generator().manual_seed(index))
    return module


def train(module: SplitTableBatchedEmbeddingBagsCodegen, steps: int) -> list[Tensor]:
    """Outputs of each step, then weights and moments."""
    results = []
    for _ in range(steps):
        for ids, lengths in BATCHES.values():
            indices = torch.tensor([*chain(*ids)], dtype=torch.long)
            offsets = torch.tensor([0, *chain(*lengths)]).cumsum(0)
            output = module(indices, offsets)
            assert output.shape == (len(indices), DIM)
            factor = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
            (output * factor).sum().backward()
            results.append(output.detach().clone())
    moments = [moment for state in module.split_optimizer_states() for moment in state]
    return [*results, *module.split_embedding_weights(), *moments]


@pytest.mark.parametrize(
    "optimizer",
    [EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD],
)
def test_vectors_weights_and_moments_equal_those_without_pooling(optimizer: EmbOptimType) -> None:
    unpooled, bags = lookup(optimizer), lookup(optimizer)
    SingleIdBags.convert(bags)
    expected, results = train(unpooled, steps=2), train(bags, steps=2)
    assert len(expected) == len(results)
    for result, reference in zip(results, expected):
        torch.testing.assert_close(result, reference, atol=1e-6, rtol=1e-6)
    old_weights = lookup(optimizer).split_embedding_weights()[0]
    assert not torch.allclose(bags.split_embedding_weights()[0], old_weights, atol=1e-3)


PRIVATE_PARTS: dict[Any, str] = {
    ShardedEmbeddingCollection: "_lookups",
    ShardedEmbeddingBagCollection: "_lookups",
    DistributedModelParallel: "_env",
    SplitTableBatchedEmbeddingBagsCodegen: "use_cpu pooling_mode feature_dims feature_table_map "
    "max_D reset_cache_states lxu_cache_locking_counter",
}


def test_the_installed_torchrec_has_the_private_parts_that_tables_use() -> None:
    missing = [
        f"{cls.__name__}.{name}"
        for cls, names in PRIVATE_PARTS.items()
        for source in [inspect.getsource(cls)]
        for name in names.split()
        if name not in source
    ]
    assert not missing, f"written for TorchRec {TORCHREC_VERSION}, not {version('torchrec')}"
