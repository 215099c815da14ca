"""Send the ids of all sharded collections in one collective, between ranks on CPU.

TorchRec exchanges the sizes of all collections together, but then sends the lengths and the values
of each collection apart: two collections, four collectives, for some 50 KB. Over gloo each costs a
round trip and wakes a thread that competes with the step, whatever its bytes. Here one collective
carries all of them; every rank gets the same tensors as from TorchRec's. On GPUs, where the
exchange runs beside the step, TorchRec's own is used. A job of one rank sends nothing at all.

Shapes: W ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.dist_data import KJTAllToAll, KJTAllToAllTensorsAwaitable, _get_recat
from torchrec.distributed.embedding_sharding import (
    FusedKJTListSplitsAwaitable,
    KJTListAwaitable,
    KJTSplitsAllToAllMeta,
    _set_sharding_context_intra_a2a,
)
from torchrec.distributed.types import NoWait
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

INTEGERS = (torch.int32, torch.int64)


def exchange_ids(request: FusedKJTListSplitsAwaitable) -> list[KJTListAwaitable]:
    """Wait for the sizes and begin to send the ids; return one awaitable per collection.

    A collective. It equals `request.wait()`, except for the number of collectives.
    """
    if not _is_one_exchange(request):
        return request.wait()
    assert request._splits_awaitable is not None
    sizes = iter(request._splits_awaitable.wait())
    parts = [
        _Part(meta, [next(sizes) for _ in meta.splits_tensors])
        for meta in request._awaitables
        if isinstance(meta, KJTSplitsAllToAllMeta)
    ]
    exchange = _Exchange(parts)
    for part in parts:
        part._awaitables = [exchange]  # type: ignore[list-item]
    ends = list(accumulate(request._output_lengths))
    awaitables = []
    for begin, end, context in zip([0, *ends], ends, request._contexts, strict=False):
        _set_sharding_context_intra_a2a(list(parts[begin:end]), context)
        awaitables.append(KJTListAwaitable(list(parts[begin:end]), context))
    return awaitables


def _is_one_exchange(request: FusedKJTListSplitsAwaitable) -> bool:
    """Return whether all is to be sent as integers between several ranks on CPU."""
    metas = request._awaitables
    return request._splits_awaitable is not None and all(
        isinstance(meta, KJTSplitsAllToAllMeta)
        and meta.pg.size() > 1
        and meta.device.type == "cpu"
        and not meta._input.variable_stride_per_key()
        and all(tensor.dim() == 1 and tensor.dtype in INTEGERS for tensor in meta.input_tensors)
        for meta in metas
    )


class _Part(KJTAllToAllTensorsAwaitable):
    """The ids of one sharding of a collection, which the exchange delivers."""

    def __init__(
        self,
        meta: KJTSplitsAllToAllMeta,
        sizes: Sequence[list[int]],  # of each tensor, then of the batches, by rank
    ) -> None:
        """Keep what TorchRec's awaitable keeps, and send nothing."""
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


def keep_ids(modules: Iterable[nn.Module]) -> None:
    """Let the collections of a job of one rank hand over their ids without a collective.

    Args:
        modules: sharded collections whose exchanges TorchRec's pipeline has replaced by its own.
    """
    for module in modules:
        for child in module.modules():
            for input_dist in getattr(child, "_input_dists", ()):
                if isinstance(getattr(input_dist, "_dist", None), KJTAllToAll):
                    input_dist._dist.forward = lambda ids: NoWait(_Kept(ids))


class _Kept(KJTAllToAllTensorsAwaitable):
    """The ids of one sharding of a collection on the only rank."""

    def __init__(self, ids: KeyedJaggedTensor) -> None:
        """Keep the ids, and the sizes that the output exchange asks for."""
        super(KJTAllToAllTensorsAwaitable, self).__init__()
        self._workers, self._input, self._recat = 1, ids, None
        self._input_splits = self._output_splits = {"values": [ids.values().numel()]}
        self._stride_per_rank = [ids.stride()]


class _Exchange:
    """One collective that carries the tensors of several parts; `wait` as of any other."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        """Begin to send. A collective."""
        self.parts = parts
        ranks = range(parts[0]._workers)
        # All travels in units of 4 bytes: numbers of 8 bytes are two of them.
        # Flattened by `cat`, as an expanded length of one row has a stride that no view accepts.
        given = [torch.cat([tensor]) for part in parts for tensor in part._input_tensors]
        tensors = [tensor.view(torch.int32) for tensor in given]
        sent, self.sizes = _units(parts, sent=True), _units(parts, sent=False)
        pieces = [tensor.split(sizes) for tensor, sizes in zip(tensors, sent, strict=True)]
        send = torch.cat([of_tensor[rank] for rank in ranks for of_tensor in pieces])
        received = [sum(sizes[rank] for sizes in self.sizes) for rank in ranks]
        self.buffer = send.new_empty(sum(received))
        counts = [sum(sizes[rank] for sizes in sent) for rank in ranks]
        self.work: Any = dist.all_to_all_single(
            self.buffer, send, received, counts, parts[0]._pg, async_op=True
        )

    def wait(self) -> None:
        """Wait for the other ranks' tensors and hand them to the parts."""
        if self.work is None:
            return
        self.work.wait()
        self.work = None
        by_rank = list(zip(*self.sizes, strict=True))  # [W][number of tensors]
        pieces = iter(self.buffer.split([size for sizes in by_rank for size in sizes]))
        rows = [[next(pieces) for _ in self.sizes] for _ in by_rank]
        columns = iter(zip(*rows, strict=True))
        for part in self.parts:
            part._output_tensors = [
                torch.cat(next(columns)).view(tensor.dtype) for tensor in part._input_tensors
            ]


def _units(parts: Sequence[_Part], sent: bool) -> list[list[int]]:
    """Return how many units of each tensor go to each rank, or come from it."""
    return [
        [size * tensor.itemsize // 4 for size in sizes]
        for part in parts
        for tensor, sizes in zip(
            part._input_tensors,
            part._input_splits_list if sent else part._output_splits_list,
            strict=True,
        )
    ]
