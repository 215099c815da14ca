"""Tables and the state of their optimizers as named tensors that fit every sharding plan.

TorchRec's tensors do not: shards are read whole, moments differ by column shard, and copies are
DTensors. Shapes: R rows, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardMetadata
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed.remote_device import _remote_device
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.shards_wrapper import LocalShardsWrapper
from torchrec.distributed.types import EmbeddingModuleShardingPlan

from embeddings.torchrec_internals import table_kernels

BLOCK_BYTES = 64 * 2**20
MAX_BLOCKS = 64  # of a shard: checks inside torch are quadratic in their number

State = dict[str, Tensor | ShardedTensor]


def current_state(model: DistributedModelParallel) -> dict[str, Any]:
    """Return the model's `state_dict`, tables as ShardedTensors, after caches are written back."""
    state = model.state_dict()  # TorchRec writes cached rows back
    for kernel in table_kernels(model):
        kernel.reset_cache_states()
    copied = {name: value for name, value in state.items() if isinstance(value, DTensor)}
    for name, value in copied.items():
        state[name] = _as_sharded_tensor(value, _planned_shards(model, name.split(".")[-2]))
    return state


def local_tensors(value: ShardedTensor | DTensor) -> list[Tensor]:
    """Return the shards on this rank, in the order of their offsets in the plan."""
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    return cast(LocalShardsWrapper, value.to_local()).local_shards()


def _planned_shards(model: DistributedModelParallel, table: str) -> list[ShardMetadata]:
    for module_plan in model.plan.plan.values():
        assert isinstance(module_plan, EmbeddingModuleShardingPlan)
        if table in module_plan:
            return module_plan[table].sharding_spec.shards  # type: ignore[union-attr]
    raise AssertionError(f"table '{table}' is not in the plan")


def _as_sharded_tensor(value: DTensor, shards: list[ShardMetadata]) -> ShardedTensor:
    """Return a table as its copy on some of the ranks; all copies are equal."""
    group, rank = value.device_mesh.get_group("shard"), value.device_mesh.get_local_rank("shard")
    local_shards = [shard for shard in shards if shard.placement.rank() == rank]  # type: ignore[union-attr]
    tensors = local_tensors(value)
    assert [list(tensor.shape) for tensor in tensors] == [
        shard.shard_sizes for shard in local_shards
    ]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        [Shard(tensor, shard) for tensor, shard in zip(tensors, local_shards, strict=True)],
        ShardedTensorMetadata(shards, value.shape, TensorProperties(dtype=value.dtype)),
        process_group=group,
    )


@dataclass(frozen=True)
class _Moment:
    """A tensor that a fused optimizer keeps for a table."""

    key: str  # name of the table's weight
    name: str
    row_wise: bool  # one number per row; False: one per weight


def sharded_in_blocks(
    placed: Sequence[tuple[ShardMetadata, Tensor | None]],
    size: Sequence[int],
    dtype: torch.dtype,
    group: dist.ProcessGroup | None,
) -> ShardedTensor:
    """Build a ShardedTensor of `size` whose shards are blocks of rows of the given ones.

    `placed` are the shards of all ranks, with their tensors where they are on this rank.
    """
    metadata: list[ShardMetadata] = []
    local: list[Shard] = []
    for shard, tensor in placed:
        row_bytes = dtype.itemsize * max(1, shard.shard_sizes[-1] if len(size) > 1 else 1)
        rows = shard.shard_sizes[0]
        block = max(1, BLOCK_BYTES // row_bytes, -(-rows // MAX_BLOCKS))
        for start in range(0, rows, block):
            count = min(block, rows - start)
            offsets = [shard.shard_offsets[0] + start, *shard.shard_offsets[1:]]
            piece = ShardMetadata(offsets, [count, *shard.shard_sizes[1:]], shard.placement)
            metadata.append(piece)
            if tensor is not None:
                local.append(Shard(tensor[start : start + count], piece))
    whole = ShardedTensorMetadata(metadata, torch.Size(size), TensorProperties(dtype=dtype))
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local, whole, process_group=group
    )


def _placed(
    tensor: ShardedTensor, local: Iterable[Tensor] | None = None
) -> list[tuple[ShardMetadata, Tensor | None]]:
    own_shards = tensor.local_shards()
    offsets = [tuple(shard.metadata.shard_offsets) for shard in own_shards]
    tensors = [shard.tensor for shard in own_shards] if local is None else local
    local_by_offsets = dict(zip(offsets, tensors, strict=True))
    shards = tensor.metadata().shards_metadata
    return [(shard, local_by_offsets.get(tuple(shard.shard_offsets))) for shard in shards]


def in_blocks(tensor: ShardedTensor, group: dist.ProcessGroup | None = None) -> ShardedTensor:
    """Return the same tensor, with shared memory, split into blocks of rows."""
    size, dtype = tensor.metadata().size, tensor.metadata().tensor_properties.dtype
    return sharded_in_blocks(_placed(tensor), size, dtype, group)


def with_shards(tensor: ShardedTensor, local: Sequence[Tensor]) -> ShardedTensor:
    """Return a tensor with the shards of another, whose content on this rank is `local`."""
    size, dtype = tensor.metadata().size, tensor.metadata().tensor_properties.dtype
    return sharded_in_blocks(_placed(tensor, local), size, dtype, tensor._process_group)


def copied_to_host(tensor: ShardedTensor, group: dist.ProcessGroup | None = None) -> ShardedTensor:
    """Return a copy of the tensor in host memory, on the same ranks."""
    size, dtype = tensor.metadata().size, tensor.metadata().tensor_properties.dtype
    placed = []
    for shard, local in _placed(tensor):
        assert shard.placement is not None
        on_host = _remote_device(f"rank:{shard.placement.rank()}/cpu")
        metadata = ShardMetadata(shard.shard_offsets, shard.shard_sizes, on_host)
        placed.append((metadata, None if local is None else local.to("cpu", copy=True)))
    return sharded_in_blocks(placed, size, dtype, group)


def table_weights(model: DistributedModelParallel) -> dict[str, ShardedTensor]:
    """Return the tables by parameter name, each [R, D], sharing memory with the model."""
    return {
        name: value
        for name, value in current_state(model).items()
        if isinstance(value, ShardedTensor)
    }


class TableOptimizerState:
    """The state of the fused optimizers of all tables, by name. Building it is a collective."""

    def __init__(self, model: DistributedModelParallel, group: dist.ProcessGroup) -> None:
        """Collect the moments of all ranks. A collective."""
        self.group = group
        self.weights = table_weights(model)
        self.local: dict[_Moment, list[Tensor]] = {}  # on this rank, in the order of the shards
        # A rank without a shard of a table does not know its moments, but must join the collective.
        for key, values in model.fused_optimizer.state_dict()["state"].items():
            for name, value in values.items():
                # ShardedTensor.size warns in every run that it will be replaced.
                is_sharded = isinstance(value, ShardedTensor)
                row_wise = len(value.metadata().size if is_sharded else value.size()) == 1
                moment = _Moment(key, name.rsplit(".", 1)[-1], row_wise)
                self.local[moment] = local_tensors(value)
        rank_moments: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(rank_moments, list(self.local), group=group)
        everywhere = {moment for moments in rank_moments for moment in moments}
        self.moments = sorted(everywhere, key=lambda moment: (moment.key, moment.name))
        self._unfinished: list[Callable[[], None]] = []

    def state_dict(self, stored: Iterable[str] | None = None) -> State:
        """Return tensors to save; with the names `stored` in a checkpoint, tensors to load into."""
        names = None if stored is None else list(stored)
        self._unfinished = []
        state: State = {}
        for moment in self.moments:
            if moment.row_wise:
                state |= self._row_wise(moment, names)
            else:
                state[f"{moment.key}.{moment.name}"] = self._per_weight(moment)
        return state

    def finish_loading(self) -> None:
        """Fill the moments that were loaded from column ranges other than this plan's."""
        for finish in self._unfinished:
            finish()
        self._unfinished = []

    def _per_weight(self, moment: _Moment) -> ShardedTensor:
        weight = self.weights[moment.key]
        placed = _placed(weight, self._local_by_offsets(moment).values())
        return sharded_in_blocks(placed, weight.metadata().size, torch.float32, self.group)

    def _local_by_offsets(self, moment: _Moment) -> dict[tuple[int, ...], Tensor]:
        """Return this rank's tensors [rows] or [rows, columns] by offsets."""
        if moment not in self.local:
            return {}
        weights = self.weights[moment.key].local_shards()
        tensors = self.local[moment]
        assert [len(shard.tensor) for shard in weights] == [len(tensor) for tensor in tensors]
        return {
            tuple(weight.metadata.shard_offsets): tensor
            for weight, tensor in zip(weights, tensors, strict=True)
        }

    def _row_wise(self, moment: _Moment, stored: list[str] | None) -> State:
        """Return one entry [R] per range of columns."""
        prefix = f"{moment.key}.{moment.name}.columns_"
        shards = self.weights[moment.key].metadata().shards_metadata
        plan_columns = sorted({_columns(shard) for shard in shards})
        stored_columns = plan_columns
        if stored is not None:
            stored_columns = sorted(
                (int(first), int(last))
                for first, last in (
                    name.removeprefix(prefix).split("_")
                    for name in stored
                    if name.startswith(prefix)
                )
            )
        if stored_columns == plan_columns:
            local = self._local_by_offsets(moment)
            return {
                f"{prefix}{first}_{last}": self._rows_of(moment, (first, last), local)
                for first, last in plan_columns
            }
        return self._row_wise_from(moment, prefix, plan_columns, stored_columns)

    def _rows_of(
        self, moment: _Moment, columns: tuple[int, int], local: dict[tuple[int, ...], Tensor]
    ) -> ShardedTensor:
        """Return the moment [R] of a range of columns of this plan."""
        weight = self.weights[moment.key].metadata()
        placed = [
            (
                ShardMetadata(shard.shard_offsets[:1], shard.shard_sizes[:1], shard.placement),
                local.get(tuple(shard.shard_offsets)),
            )
            for shard in weight.shards_metadata
            if _columns(shard) == columns
        ]
        return sharded_in_blocks(placed, weight.size[:1], torch.float32, self.group)

    def _row_wise_from(
        self,
        moment: _Moment,
        prefix: str,
        plan_columns: list[tuple[int, int]],
        stored_columns: list[tuple[int, int]],
    ) -> State:
        """Return empty tensors [R] for stored column ranges; `finish_loading` combines them."""
        local = self._local_by_offsets(moment)
        state: State = {}
        rooms: dict[tuple[int, int], dict[tuple[int, ...], Tensor]] = {}
        for columns in stored_columns:
            name = f"{prefix}{columns[0]}_{columns[1]}"
            if len(plan_columns) == 1:
                rooms[columns] = {at: torch.zeros_like(tensor) for at, tensor in local.items()}
                state[name] = self._rows_of(moment, plan_columns[0], rooms[columns])
            elif local:
                room = torch.zeros(self.weights[moment.key].metadata().size[0])
                rooms[columns] = dict.fromkeys(local, room)
                state[name] = room

        def combine() -> None:
            for shard in self.weights[moment.key].local_shards():
                offsets = tuple(shard.metadata.shard_offsets)
                first, last = _columns(shard.metadata)
                local[offsets].zero_()
                for (stored_first, stored_last), room in rooms.items():
                    shared = min(last, stored_last) - max(first, stored_first)
                    if shared > 0:
                        loaded = room[offsets].to(local[offsets].device)
                        local[offsets].add_(loaded, alpha=shared / (last - first))

        self._unfinished.append(combine)
        return state


def _columns(shard: ShardMetadata) -> tuple[int, int]:
    return shard.shard_offsets[1], shard.shard_offsets[1] + shard.shard_sizes[1]
