"""All private parts of TorchRec that training uses, written for TorchRec 1.8.

`tests/recsys/distributed/test_torchrec_internals.py` says which of them an upgrade has changed.
On CPU ids travel in one collective, not in two per collection. Shapes: W ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.dist_data import KJTAllToAll, KJTAllToAllTensorsAwaitable, _get_recat
from torchrec.distributed.embedding_sharding import (
    FusedKJTListSplitsAwaitable,
    KJTListAwaitable,
    KJTSplitsAllToAllMeta,
    _set_sharding_context_intra_a2a,
)
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.pipeline_context import TrainPipelineContext
from torchrec.distributed.train_pipeline.runtime_forwards import BaseForward
from torchrec.distributed.types import Awaitable, NoWait, ShardedModule, ShardingEnv
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

TORCHREC_VERSION = "1.8"
INTEGERS = (torch.int32, torch.int64)


class DataParallelWrapper(DefaultDataParallelWrapper):
    """TorchRec's wrapper of the dense parameters; a job of one rank gets none."""

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        """Wrap the model in DistributedDataParallel, or only move it to its device."""
        if env.world_size == 1:
            dmp._dmp_wrapped_module = dmp._dmp_wrapped_module.to(device)
        else:
            super().wrap(dmp, env, device)


def no_gradient_reduction(model: DistributedModelParallel) -> AbstractContextManager[Any]:
    """Return a context in which a backward does not average the dense gradients over the ranks."""
    wrapped = model._dmp_wrapped_module
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()


def require_pipelined(model: nn.Module) -> None:
    """Raise a RuntimeError if, after a first step, a sharded module does not send its ids ahead."""
    for name, module in model.named_modules():
        if isinstance(module, ShardedModule) and not isinstance(module.forward, BaseForward):
            raise RuntimeError(
                f"sharded module '{name}' is not pipelined: EM3.forward must stay a straight line "
                "and give each collection an attribute of the batch itself"
            )


class IdsPipeline(TrainPipelineSparseDist[Any, Any]):
    """TorchRec's pipeline with `exchange_ids` and `LocalIds`."""

    def _pipeline_model(self, *arguments: Any, **options: Any) -> None:
        super()._pipeline_model(*arguments, **options)
        if self._model._env.world_size == 1:
            keep_ids(self._pipelined_modules)

    def sync_embeddings(self, *arguments: Any, **options: Any) -> None:
        """Leave the mean over copies of tables to `CopiesMean`; TorchRec takes it every batch."""

    def wait_sparse_data_dist(self, context: TrainPipelineContext) -> None:
        """Send the ids of the next batch once their sizes are known. A collective."""
        with (
            record_function(f"## wait_sparse_data_dist {context.index} ##"),
            self._stream_context(self._data_dist_stream),
        ):
            for names, request in context.fused_splits_awaitables:
                for name, awaitable in zip(names, exchange_ids(request), strict=True):
                    context.input_dist_tensors_requests[name] = awaitable
        context.input_dist_splits_requests.clear()
        context.fused_splits_awaitables.clear()


def keep_ids(modules: Iterable[nn.Module]) -> None:
    """Replace the exchanges of sharded collections on the only rank by `LocalIds`."""
    for module in modules:
        for child in module.modules():
            for input_dist in getattr(child, "_input_dists", ()):
                if isinstance(exchange := getattr(input_dist, "_dist", None), KJTAllToAll):
                    splits, stagger = exchange._splits, exchange._stagger
                    input_dist._dist = LocalIds(exchange._pg, splits, stagger)


class LocalIds(KJTAllToAll):
    """Hands the ids of one sharding of a collection over on the only rank."""

    def forward(self, ids: KeyedJaggedTensor) -> Awaitable[KJTAllToAllTensorsAwaitable]:
        return NoWait(_KeptIds(ids))


class _KeptIds(KJTAllToAllTensorsAwaitable):
    """The ids, and the sizes that the output exchange asks for."""

    def __init__(self, ids: KeyedJaggedTensor) -> None:
        super(KJTAllToAllTensorsAwaitable, self).__init__()
        self._workers, self._input, self._recat = 1, ids, None
        self._input_splits = self._output_splits = {"values": [ids.values().numel()]}
        self._stride_per_rank = [ids.stride()]


def exchange_ids(request: FusedKJTListSplitsAwaitable) -> list[KJTListAwaitable]:
    """Begin to send the ids; return one awaitable per collection. A collective."""
    if not _is_one_exchange(request):
        return request.wait()
    assert request._splits_awaitable is not None
    sizes = iter(request._splits_awaitable.wait())
    shardings = [
        _ShardingIds(meta, [next(sizes) for _ in meta.splits_tensors])
        for meta in request._awaitables
        if isinstance(meta, KJTSplitsAllToAllMeta)
    ]
    exchange = _Exchange(shardings)
    for sharding in shardings:
        sharding._awaitables = [exchange]  # type: ignore[list-item]
    ends = list(accumulate(request._output_lengths))
    awaitables = []
    for begin, end, context in zip([0, *ends], ends, request._contexts, strict=False):
        _set_sharding_context_intra_a2a(list(shardings[begin:end]), context)
        awaitables.append(KJTListAwaitable(list(shardings[begin:end]), context))
    return awaitables


def _is_one_exchange(request: FusedKJTListSplitsAwaitable) -> bool:
    """Return whether all is to be sent as integers between several ranks on CPU."""
    return request._splits_awaitable is not None and all(
        isinstance(meta, KJTSplitsAllToAllMeta)
        and meta.pg.size() > 1
        and meta.device.type == "cpu"
        and not meta._input.variable_stride_per_key()
        and all(tensor.dim() == 1 and tensor.dtype in INTEGERS for tensor in meta.input_tensors)
        for meta in request._awaitables
    )


class _ShardingIds(KJTAllToAllTensorsAwaitable):
    """The ids of one sharding of a collection, which the exchange delivers."""

    def __init__(
        self,
        meta: KJTSplitsAllToAllMeta,
        sizes: Sequence[list[int]],  # of each tensor, then of the batches, by rank
    ) -> None:
        super(KJTAllToAllTensorsAwaitable, self).__init__()
        *output_splits, strides = sizes
        rank = meta.pg.rank()
        self._pg, self._workers, self._world_size = meta.pg, meta.pg.size(), meta.pg.size()
        self._device, self._input, self._splits = meta.device, meta._input, meta.splits
        self._input_splits_list, self._output_splits_list = meta.input_splits, output_splits
        self._input_splits = dict(zip(meta.labels, meta.input_splits, strict=True))
        self._output_splits = dict(zip(meta.labels, output_splits, strict=True))
        self._keys, self._stagger, self._stride_per_rank = meta.keys, meta.stagger, strides
        self._recat = _get_recat(
            meta.splits[rank], len(meta.splits), meta.stagger, meta.device, strides
        )
        self._input_tensors: list[Tensor] = meta.input_tensors
        self._output_tensors: list[Tensor] = []
        self._awaitables: list[dist.Work] = []


class _Exchange:
    """One collective that carries the tensors of several shardings; `wait` as of any other."""

    def __init__(self, shardings: Sequence[_ShardingIds]) -> None:
        """Begin to send. A collective."""
        self.shardings = shardings
        ranks = range(shardings[0]._workers)
        # All travels in units of 4 bytes. `cat` flattens: an expanded length has a stride of 0.
        tensors = [
            torch.cat([tensor]).view(torch.int32)
            for sharding in shardings
            for tensor in sharding._input_tensors
        ]
        sent, self.sizes = _units(shardings, sent=True), _units(shardings, sent=False)
        pieces = [tensor.split(sizes) for tensor, sizes in zip(tensors, sent, strict=True)]
        send = torch.cat([tensor_pieces[rank] for rank in ranks for tensor_pieces in pieces])
        received = [sum(sizes[rank] for sizes in self.sizes) for rank in ranks]
        self.buffer = send.new_empty(sum(received))
        counts = [sum(sizes[rank] for sizes in sent) for rank in ranks]
        self.work: Any = dist.all_to_all_single(
            self.buffer, send, received, counts, shardings[0]._pg, async_op=True
        )

    def wait(self) -> None:
        """Wait for the other ranks' tensors and hand them to the shardings."""
        if self.work is None:
            return
        self.work.wait()
        self.work = None
        by_rank = list(zip(*self.sizes, strict=True))  # [W][number of tensors]
        pieces = iter(self.buffer.split([size for sizes in by_rank for size in sizes]))
        rows = [[next(pieces) for _ in self.sizes] for _ in by_rank]
        columns = iter(zip(*rows, strict=True))
        for sharding in self.shardings:
            sharding._output_tensors = [
                torch.cat(next(columns)).view(tensor.dtype) for tensor in sharding._input_tensors
            ]


def _units(shardings: Sequence[_ShardingIds], sent: bool) -> list[list[int]]:
    """Return how many units of each tensor go to each rank, or come from it."""
    return [
        [size * tensor.itemsize // 4 for size in sizes]
        for sharding in shardings
        for tensor, sizes in zip(
            sharding._input_tensors,
            sharding._input_splits_list if sent else sharding._output_splits_list,
            strict=True,
        )
    ]
