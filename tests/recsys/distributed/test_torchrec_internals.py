"""Private parts of TorchRec: which have changed, and the exchange of ids against TorchRec's own."""

import inspect
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torchrec.distributed import dist_data, embedding_sharding, model_parallel
from torchrec.distributed.embedding_sharding import (
    EmbeddingShardingContext,
    FusedKJTListSplitsAwaitable,
    KJTListSplitsAwaitable,
)
from torchrec.distributed.train_pipeline import runtime_forwards, train_pipelines, utils
from torchrec.distributed.train_pipeline.runtime_forwards import KJTAllToAllForward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.distributed.torchrec_internals import TORCHREC_VERSION, exchange_ids
from tests.ranks import run_on_ranks


def ids_of(rank: int, names: list[str], dtype: torch.dtype) -> KeyedJaggedTensor:
    """Two rows; the second rank has more ids, and of the first feature none in its first row."""
    lengths = torch.tensor([[1, 0, 2, 1], [0, 3, 1, 4]][rank], dtype=dtype)
    values = torch.arange(int(lengths.sum())) + 100 * rank
    return KeyedJaggedTensor(names, values, lengths=lengths)


def received(rank: int, world_size: int) -> dict[str, Any]:
    """By way of sending: what arrives of two collections, and the collectives it takes."""
    group = dist.group.WORLD
    assert group is not None
    actual: dict[str, Any] = {}
    for way in ("torchrec", "here"):
        requests = []
        for names, splits, dtype in [
            (["user", "shop"], [1, 1], torch.int64),
            (["item", "tags"], [2, 0], torch.int32),
        ]:
            meta: Any = KJTAllToAllForward(group, splits)(ids_of(rank, names, dtype))
            requests.append(KJTListSplitsAwaitable([meta], _context()))
        contexts = [request.ctx for request in requests]
        request = FusedKJTListSplitsAwaitable(requests, contexts, group)
        with patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as sent:
            lists = request.wait() if way == "torchrec" else exchange_ids(request)
            arrived = [one for awaitable in lists for one in awaitable.wait()]
        actual[way] = [
            (kjt.keys(), kjt.values().tolist(), kjt.lengths().tolist(), kjt.lengths().dtype)
            for kjt in arrived
        ]
        actual[f"{way}, sizes"] = [context.sharding_contexts[0] for context in contexts]
        actual[f"{way}, collectives"] = sent.call_count
    return actual


def _context() -> Any:
    context: Any = type("Context", (), {})()
    context.sharding_contexts = [EmbeddingShardingContext()]
    return context


def test_one_collective_brings_the_same_ids_as_torchrec() -> None:
    for actual in run_on_ranks(received, 2):
        assert actual["here"] == actual["torchrec"]
        assert actual["here, sizes"] == actual["torchrec, sizes"]
        assert (actual["torchrec, collectives"], actual["here, collectives"]) == (4, 1)


# What `recsys.distributed.torchrec_internals` uses: a part of TorchRec, and names in its source.
PRIVATE_PARTS: dict[Any, str] = {
    dist_data.KJTAllToAll: "_pg _splits _stagger",
    dist_data.KJTAllToAllTensorsAwaitable: "_workers _recat _input_splits _output_splits "
    "_input _stride_per_rank _keys _stagger _awaitables _output_tensors _input_tensors",
    embedding_sharding.KJTSplitsAllToAllMeta: "pg _input splits splits_tensors input_splits "
    "input_tensors labels keys device stagger",
    embedding_sharding.FusedKJTListSplitsAwaitable: "_awaitables _contexts _output_lengths "
    "_splits_awaitable",
    embedding_sharding: "_set_sharding_context_intra_a2a",
    dist_data: "_get_recat",
    model_parallel.DistributedModelParallel: "_dmp_wrapped_module _env",
    train_pipelines.TrainPipelineSparseDist: "_pipeline_model _pipelined_modules "
    "wait_sparse_data_dist _stream_context _data_dist_stream sync_embeddings",
    utils: "_input_dists _dist",
    runtime_forwards: "BaseForward",
}


def test_the_installed_torchrec_has_the_private_parts_that_training_uses() -> None:
    missing = [
        f"{part.__name__}.{name}"
        for part, names in PRIVATE_PARTS.items()
        for name in names.split()
        if name not in inspect.getsource(part)
    ]
    assert not missing, f"written for TorchRec {TORCHREC_VERSION}, not {version('torchrec')}"
