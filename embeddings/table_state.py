"""Tables and their optimizers' state as named tensors that load under every sharding plan.

TorchRec's own tensors do not: a shard is read as a whole, moments differ by column shard, and
copies are DTensors. Shapes: R rows, D dimension.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardMetadata
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.shards_wrapper import LocalShardsWrapper
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

from embeddings.torchrec_internals import copies_group, table_kernels

BLOCK_BYTES = 64 * 2**20
MAX_BLOCKS = 64  # per shard, as torch's checks take time quadratic in the number of blocks

State = dict[str, Tensor | ShardedTensor]
Columns = tuple[int, int]  # first, and one after the last


def current_state(model: nn.Module) -> dict[str, Any]:
    """Write caches back and return the model's `state_dict`, with tables as ShardedTensors."""
    state = model.state_dict()  # TorchRec writes cached rows back
    for kernel in table_kernels(model):
        kernel.reset_cache_states()
    for name, value in state.items():
        if isinstance(value, DTensor):
            plan, group = cast(DistributedModelParallel, model).plan, copies_group(model)
            spec = planned_sharding(plan, name.split(".")[-2]).sharding_spec
            state[name] = _as_sharded_tensor(value, spec.shards, group)
    return state


def planned_sharding(plan: ShardingPlan, table: str) -> ParameterSharding:
    """Return how a plan shards a table."""
    for module_plan in plan.plan.values():
        assert isinstance(module_plan, EmbeddingModuleShardingPlan)
        if table in module_plan:
            return module_plan[table]
    raise AssertionError(f"table '{table}' is not in the plan")


def local_tensors(value: ShardedTensor | DTensor) -> list[Tensor]:
    """Return the shards on this rank, in the order of their offsets in the plan."""
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    return cast(LocalShardsWrapper, value.to_local()).local_shards()


def _as_sharded_tensor(
    value: DTensor, shards: list[ShardMetadata], group: dist.ProcessGroup
) -> ShardedTensor:
    """Return the copy of a table that the plan's ranks hold; all copies are equal."""
    rank = dist.get_rank(group)
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


class _Moment(NamedTuple):
    """A tensor that a fused optimizer keeps for a table."""

    key: str  # name of the table's weight
    name: str
    row_wise: bool  # one number per row; False: one per weight


def sharded_in_blocks(
    shards: Sequence[tuple[ShardMetadata, Tensor | None]],
    size: Sequence[int],
    dtype: torch.dtype,
    group: dist.ProcessGroup | None,
) -> ShardedTensor:
    """Build a ShardedTensor of `size` by splitting the given shards into blocks of rows.

    `shards` lists the shards of all ranks, each with its tensor if it is on this rank.
    """
    metadata: list[ShardMetadata] = []
    local: list[Shard] = []
    for shard, tensor in shards:
        row_bytes = dtype.itemsize * max(1, shard.shard_sizes[-1] if len(size) > 1 else 1)
        rows = shard.shard_sizes[0]
        block = max(1, BLOCK_BYTES // row_bytes, -(-rows // MAX_BLOCKS))
        for start in range(0, rows, block):
            count = min(block, rows - start)
            offsets = [shard.shard_offsets[0] + start, *shard.shard_offsets[1:]]
            spec = ShardMetadata(offsets, [count, *shard.shard_sizes[1:]], shard.placement)
            metadata.append(spec)
            if tensor is not None:
                local.append(Shard(_alone_in_storage(tensor[start : start + count]), spec))
    full = ShardedTensorMetadata(metadata, torch.Size(size), TensorProperties(dtype=dtype))
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local, full, process_group=group
    )


def _alone_in_storage(view: Tensor) -> Tensor:
    """Return a tensor over the same memory whose storage has nothing else.

    torch's checkpoint writer copies views of larger storages and holds all copies until it ends.
    """
    if view.device.type != "cpu" or not view.is_contiguous() or not view.numel():
        return view
    return torch.from_numpy(view.detach().view(torch.uint8).numpy()).view(view.dtype)


def _shard_tensors(
    tensor: ShardedTensor, local: Iterable[Tensor] | None = None
) -> list[tuple[ShardMetadata, Tensor | None]]:
    """Return the shards of all ranks, each with its tensor, or that of `local`, if it is here."""
    local_shards = tensor.local_shards()
    offsets = [tuple(shard.metadata.shard_offsets) for shard in local_shards]
    tensors = [shard.tensor for shard in local_shards] if local is None else local
    local_by_offsets = dict(zip(offsets, tensors))
    shards = tensor.metadata().shards_metadata
    return [(shard, local_by_offsets.get(tuple(shard.shard_offsets))) for shard in shards]


def in_blocks(
    tensor: ShardedTensor,
    group: dist.ProcessGroup | None = None,
    local: Sequence[Tensor] | None = None,
) -> ShardedTensor:
    """Return a tensor in blocks of rows that share its memory, or that of `local` if given."""
    size, dtype = tensor.metadata().size, tensor.metadata().tensor_properties.dtype
    return sharded_in_blocks(_shard_tensors(tensor, local), size, dtype, group)


def copied_to_host(tensor: ShardedTensor, group: dist.ProcessGroup | None = None) -> ShardedTensor:
    """Return a copy of the tensor in host memory, on the same ranks."""
    size, dtype = tensor.metadata().size, tensor.metadata().tensor_properties.dtype
    shards = []
    for shard, local in _shard_tensors(tensor):
        assert shard.placement is not None
        on_host = f"rank:{shard.placement.rank()}/cpu"
        metadata = ShardMetadata(shard.shard_offsets, shard.shard_sizes, on_host)
        shards.append((metadata, None if local is None else local.to("cpu", copy=True)))
    return sharded_in_blocks(shards, size, dtype, group)


def table_weights(model: nn.Module) -> dict[str, ShardedTensor]:
    """Return the tables by parameter name, each [R, D], sharing memory with the model."""
    state = current_state(model).items()
    return {name: value for name, value in state if isinstance(value, ShardedTensor)}


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
                # `metadata().size`, because ShardedTensor.size() logs a deprecation warning.
                is_sharded = isinstance(value, ShardedTensor)
                row_wise = len(value.metadata().size if is_sharded else value.size()) == 1
                moment = _Moment(key, name.rsplit(".", 1)[-1], row_wise)
                self.local[moment] = local_tensors(value)
        rank_moments: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(rank_moments, list(self.local), group=group)
        self.moments = sorted({moment for moments in rank_moments for moment in moments})
        self._unfinished: list[Callable[[], None]] = []

    def state_dict(self, stored: Collection[str] | None = None) -> State:
        """Return tensors to save; given the names `stored` in a checkpoint, tensors to load into.

        A row-wise moment has one entry [R] per range of columns.
        """
        self._unfinished = []
        state: State = {}
        for moment in self.moments:
            weight, local = self.weights[moment.key], self._local_moments(moment)
            if not moment.row_wise:
                located, size = _shard_tensors(weight, local), weight.metadata().size
                blocks = sharded_in_blocks(located, size, torch.float32, self.group)
                state[f"{moment.key}.{moment.name}"] = blocks
                continue
            prefix = f"{moment.key}.{moment.name}.columns_"
            shards = weight.metadata().shards_metadata
            ranges = plan_ranges = sorted({_columns(shard) for shard in shards})
            if stored is not None:
                ends = [name.removeprefix(prefix) for name in stored if name.startswith(prefix)]
                pairs = [text.split("_") for text in ends]
                ranges = sorted((int(first), int(last)) for first, last in pairs)
            rows: dict[Columns, Tensor | ShardedTensor]
            if ranges == plan_ranges:
                rows = {columns: self._by_row(moment, columns, local) for columns in ranges}
            else:
                rows = self._stored_rows(moment, plan_ranges, ranges)
            state |= {f"{prefix}{first}_{last}": value for (first, last), value in rows.items()}
        return state

    def finish_loading(self) -> None:
        """Fill the moments that were loaded from column ranges other than this plan's."""
        for finish in self._unfinished:
            finish()
        self._unfinished = []

    def _local_moments(self, moment: _Moment) -> list[Tensor]:  # in the order of the table's shards
        tensors = self.local.get(moment, [])
        shards = self.weights[moment.key].local_shards()
        assert all(len(shard.tensor) == len(tensor) for shard, tensor in zip(shards, tensors))
        return tensors

    def _by_row(self, moment: _Moment, columns: Columns, local: Sequence[Tensor]) -> ShardedTensor:
        """Return the moment [R] of a range of columns of this plan."""
        weight = self.weights[moment.key]
        shards = [
            (ShardMetadata(shard.shard_offsets[:1], shard.shard_sizes[:1], shard.placement), tensor)
            for shard, tensor in _shard_tensors(weight, local)
            if _columns(shard) == columns
        ]
        return sharded_in_blocks(shards, weight.metadata().size[:1], torch.float32, self.group)

    def _stored_rows(
        self, moment: _Moment, plan_ranges: list[Columns], ranges: list[Columns]
    ) -> dict[Columns, Tensor | ShardedTensor]:
        """Return empty tensors [R] for stored column ranges; `finish_loading` combines them."""
        local = self._local_moments(moment)
        rows: dict[Columns, Tensor | ShardedTensor] = {}
        buffers: dict[Columns, list[Tensor]] = {}  # by range, for each shard of this rank
        for columns in ranges:
            if len(plan_ranges) == 1:
                buffers[columns] = [torch.zeros_like(tensor) for tensor in local]
                rows[columns] = self._by_row(moment, plan_ranges[0], buffers[columns])
            elif local:
                rows[columns] = buffer = torch.zeros(self.weights[moment.key].metadata().size[0])
                buffers[columns] = [buffer] * len(local)

        def combine() -> None:
            shards = self.weights[moment.key].local_shards()
            for number, (shard, tensor) in enumerate(zip(shards, local)):
                first, last = _columns(shard.metadata)
                tensor.zero_()
                for (stored_first, stored_last), buffer in buffers.items():
                    shared = min(last, stored_last) - max(first, stored_first)
                    if shared > 0:
                        loaded = buffer[number].to(tensor.device)
                        tensor.add_(loaded, alpha=shared / (last - first))

        self._unfinished.append(combine)
        return rows


def _columns(shard: ShardMetadata) -> Columns:
    return shard.shard_offsets[1], shard.shard_offsets[1] + shard.shard_sizes[1]
