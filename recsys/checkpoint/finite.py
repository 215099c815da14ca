"""Find values of a state that are not finite, before they are saved over good ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from embeddings.table_state import State
from recsys.build import Job


def require_finite(job: Job, state: State, step: int, last_good: Callable[[], Path | None]) -> None:
    """Check every weight and moment of a state. A collective.

    Args:
        job: the job.
        state: the state of the job.
        step: number of steps after which the job has this state.
        last_good: returns the last good checkpoint.

    Raises:
        ValueError: on every rank, if a value is not finite on any; names its parameter or table.
    """
    with job.ranks.raise_on_all_ranks():
        fault = describe_not_finite(state, {name for name, _ in job.em3.named_parameters()})
        if fault is not None:
            raise ValueError(
                f"{fault}, after step {step}, which is not saved; lower the learning rates, or set "
                f"optimizer.clip_norm. The last good checkpoint is {last_good()}"
            )


@torch.no_grad()
def describe_not_finite(state: State, parameters: Collection[str]) -> str | None:
    """Describe the first weight or moment on this rank that is not finite; None if all are.

    Buffers of the model are left out, since a mask may hold infinities. A sum is one pass over
    memory without a copy; single values are examined only if it is not finite.

    Args:
        state: the state to save.
        parameters: names of the model's parameters.
    """
    for name, value in state.items():
        is_buffer = name.startswith("model.") and name.removeprefix("model.") not in parameters
        for first_row, piece in _local_pieces(value):
            if is_buffer or not piece.is_floating_point() or _has_finite_sum(piece):
                continue
            rows = (~piece.isfinite()).reshape(len(piece) if piece.dim() else 1, -1).any(dim=1)
            if rows.any():
                place = first_row + int(rows.int().argmax())
                return f"{_title(name, value)}: not finite in {int(rows.sum())} rows, first {place}"
    return None


def _has_finite_sum(piece: Tensor) -> bool:
    return bool(piece.sum(dtype=torch.promote_types(piece.dtype, torch.float32)).isfinite())


def _local_pieces(value: Tensor | ShardedTensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the pieces of a tensor on this rank, each with its first row."""
    if isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            yield shard.metadata.shard_offsets[0], shard.tensor
    else:
        yield 0, value


def _title(name: str, value: Tensor | ShardedTensor) -> str:
    is_table = isinstance(value, ShardedTensor) and name.startswith("model.")
    return f"table '{name.split('.')[-2]}'" if is_table else name.removeprefix("model.")
