"""The state in a checkpoint, as named tensors that share their memory with the job.

`model.*` are trained weights, `bank` the memory bank, `vocabulary.*` learned maps of raw ids,
`optimizer.*` optimizer states and averages, `random.RANK.*` generators. It has no frozen weights.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from embeddings import MemoryBank
from embeddings.table_state import (
    State,
    TableOptimizerState,
    copied_to_host,
    current_state,
    in_blocks,
)
from recsys.build import Job
from recsys.config import content_settings
from recsys.content.encoders.base import Encoder
from recsys.optimizer.dense import make_room, restore_numbers, state_tensors

# Tensors that checkpoints of older releases lack: neighbours then have folds of users.
ADDED_TENSORS = {"model.neighbours.block_starts"}


def model_state(job: Job, metadata: Mapping[str, Any] | None = None) -> State:
    """Return weights and memory bank: the state that evaluation and prediction need."""
    _check_feature_widths(job, metadata or {})
    stored = _is_stored(job)
    state: State = {}
    for name, value in current_state(job.model).items():
        if stored(name):
            is_table = isinstance(value, ShardedTensor)
            state[f"model.{name}"] = in_blocks(value, job.ranks.group) if is_table else value
    for name, bank in _banks(job).items():
        pool = bank.state_dict()["pool"]
        assert isinstance(pool, ShardedTensor)
        state[name] = in_blocks(pool, job.ranks.group)
    if metadata is not None:
        state = {n: v for n, v in state.items() if n in metadata or n not in ADDED_TENSORS}
    maps = job.vocabularies.state_dict()
    return state | {f"vocabulary.{name}": value for name, value in maps.items()}


def _check_feature_widths(job: Job, metadata: Mapping[str, Any]) -> None:
    """Raise a ValueError if the input width of a modality differs from that in a checkpoint."""
    content, items = content_settings(job.config.content), job.schema.items
    for name, encoder in job.em3.content.encoders.items() if job.em3.content else ():
        weight = metadata.get(f"model.content.projections.{name}.weight")
        width = cast(Encoder, encoder).output_dim
        if weight is not None and weight.size[1] != width:
            assert content is not None and items is not None
            column = content.modalities[name].column
            file = job.root / (items.columns[column].file or "items")
            raise ValueError(
                f"{file}: column '{column}' has features of {width} values, but the run was "
                f"trained on features of {weight.size[1]}; write features of that width, or train "
                "anew"
            )


def finish_loading_bank(job: Job) -> None:
    """Complete the memory bank after a load into `model_state`. A collective."""
    for bank in _banks(job).values():
        bank.finish_loading()


def _banks(job: Job) -> dict[str, MemoryBank]:
    """Return the rows per item by name: content vectors, and outputs of sampled encoders."""
    if (content := job.em3.content) is None:
        return {}
    outputs = None if content.outputs is None else content.outputs.bank
    banks = {"bank": content.bank, "encoder_outputs": outputs}
    return {name: bank for name, bank in banks.items() if bank is not None}


def _is_stored(job: Job) -> Callable[[str], bool]:
    parameters = list(job.em3.named_parameters())
    trained = {name for name, value in parameters if value.requires_grad}
    frozen = {name for name, value in parameters} - trained
    encoders = job.em3.content.encoders.items() if job.em3.content else ()
    left_out = tuple(
        f"content.encoders.{name}." for name, encoder in encoders if cast(Encoder, encoder).caches
    )
    return lambda name: name in trained or not (name in frozen or name.startswith(left_out))


def frozen_digest(job: Job) -> str:
    """Hash the frozen weights, which a checkpoint leaves out."""
    stored, digest = _is_stored(job), hashlib.blake2b(digest_size=16)
    for name, value in sorted(job.model.state_dict().items()):
        if isinstance(value, Tensor) and not stored(name):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TrainingState:
    """The whole state of a job in training. Building it is a collective."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.moments = TableOptimizerState(job.model, job.ranks.group)

    def state_dict(self, stored: Mapping[str, Any] | None = None) -> State:
        """Return tensors to save; with the metadata of a checkpoint, tensors to load into."""
        prefix = "optimizer.tables."
        names = None
        if stored is not None:
            names = [name.removeprefix(prefix) for name in stored if name.startswith(prefix)]
        state = model_state(self.job, stored)
        tables = self.moments.state_dict(names)
        state |= {f"{prefix}{name}": value for name, value in tables.items()}
        state |= self._dense_optimizer(stored)
        averages = self.job.averages.state_dict() if self.job.averages is not None else {}
        optional = {f"optimizer.average.{name}": value for name, value in averages.items()}
        rank, device = self.job.ranks.rank, self.job.ranks.device
        optional[f"random.{rank}.cpu"] = torch.get_rng_state()
        if device.type == "cuda":
            optional[f"random.{rank}.cuda"] = torch.cuda.get_rng_state(device)
        state |= {n: value for n, value in optional.items() if stored is None or n in stored}
        self._loaded = state
        return state

    def finish_loading(self) -> None:
        """Finish a load: apply the loaded values that do not share memory with the job."""
        self.moments.finish_loading()
        restore_numbers(self.job.dense_optimizer)
        finish_loading_bank(self.job)
        rank, device = self.job.ranks.rank, self.job.ranks.device
        if (cpu := self._loaded.get(f"random.{rank}.cpu")) is not None:
            torch.set_rng_state(cpu)
        if (cuda := self._loaded.get(f"random.{rank}.cuda")) is not None:
            torch.cuda.set_rng_state(cuda, device)

    def _dense_optimizer(self, stored: Mapping[str, Any] | None) -> State:
        prefix, optimizer = "optimizer.dense.", self.job.dense_optimizer
        names = {value: name for name, value in self.job.em3.named_parameters()}
        if stored is None:
            tensors = state_tensors(optimizer, names)
        else:
            sizes = {
                name.removeprefix(prefix): (tensor.size, tensor.properties.dtype)
                for name, tensor in stored.items()
                if name.startswith(prefix)
            }
            tensors = make_room(optimizer, names, sizes)
        return {f"{prefix}{name}": value for name, value in tensors.items()}


def num_bytes(state: State) -> int:
    """Return the bytes of the tensors on this rank."""
    return sum(shard.tensor.nbytes for value in state.values() for shard in local_shards(value))


def copy_of(state: State, job: Job) -> State:
    """Copy the state to host memory, so that later steps do not change it."""
    return {
        name: copied_to_host(value, job.ranks.group)
        if isinstance(value, ShardedTensor)
        else value.detach().to("cpu", copy=True)
        for name, value in state.items()
    }


@torch.no_grad()
def describe_not_finite(state: State, parameters: Collection[str]) -> str | None:
    """Describe the first parameter or moment on this rank that is not finite; None if all are."""
    for name, value in state.items():
        if name.startswith("model.") and name.removeprefix("model.") not in parameters:
            continue
        for tensor, first_row, _ in local_shards(value):
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            if not tensor.is_floating_point() or tensor.sum(dtype=dtype).isfinite():
                continue
            rows = (~tensor.isfinite()).reshape(len(tensor) if tensor.dim() else 1, -1).any(dim=1)
            if rows.any():
                row = first_row + int(rows.int().argmax())
                title = name.removeprefix("model.")
                if isinstance(value, ShardedTensor) and name.startswith("model."):
                    title = f"table '{name.split('.')[-2]}'"
                return f"{title}: not finite in {int(rows.sum())} rows, first {row}"
    return None


class LocalShard(NamedTuple):
    """A part of a tensor on this rank: its memory, and its first row and column in the whole."""

    tensor: Tensor  # [rows] or [rows, columns]
    row: int = 0
    column: int = 0


def local_shards(value: Tensor | ShardedTensor) -> list[LocalShard]:
    """Return the shards of a tensor on this rank."""
    if not isinstance(value, ShardedTensor):
        return [LocalShard(value)]
    return [LocalShard(s.tensor, *s.metadata.shard_offsets) for s in value.local_shards()]
