"""Moves rows of a checkpoint to other rows of sharded tensors, a range of them at a time.

A rank reads what its own shards need, once, in the order of the file: memory is a few blocks beside
the shards and two numbers per row, however large the table.

Shapes: R rows, N rows of a block, D dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from recsys.checkpoint.stored_tensor import StoredTensor
from recsys.checkpoint.warm_start.row_maps import RowMap

BLOCK_BYTES = 2**25


@dataclass(frozen=True)
class _Piece:
    """Rows of the new tensor on this rank."""

    tensor: Tensor  # [rows] or [rows, columns], the memory of the job
    row: int
    columns: slice


def size_of(tensor: Tensor | ShardedTensor) -> tuple[int, ...]:
    """Return the size of a whole tensor."""
    whole = tensor.metadata().size if isinstance(tensor, ShardedTensor) else tensor.shape
    return tuple(whole)


@torch.no_grad()
def move_rows(target: Tensor | ShardedTensor, stored: StoredTensor, rows: RowMap) -> None:
    """Fill the rows of `target` that have an old row; the others stay. Not a collective.

    Args:
        target: [R] or [R, D]; of a sharded one the shards on this rank.
        stored: the same tensor in the checkpoint, with other rows.
        rows: the old rows of the new ones.

    Raises:
        ValueError: a file of the checkpoint cannot be read.
    """
    row_bytes = 8 * math.prod(stored.size[1:])
    _move(list(_pieces(target)), stored.rows, max(1, BLOCK_BYTES // row_bytes), rows)


@torch.no_grad()
def move_sets(target: Tensor | ShardedTensor, stored: StoredTensor, rows: RowMap) -> None:
    """Fill an entry of a bounded vocabulary, [S, R] with one number per row of its table.

    Arguments and errors are those of `move_rows`. Not a collective.
    """
    per_set, old_per_set = size_of(target)[1], stored.size[1]
    pieces = [
        _Piece(piece.tensor.view(-1), piece.row * per_set, slice(None)) for piece in _pieces(target)
    ]

    def read(start: int, stop: int) -> Tensor:
        first, last = start // old_per_set, -(-stop // old_per_set)
        return stored.rows(first, last).flatten()[start - first * old_per_set :][: stop - start]

    _move(pieces, read, BLOCK_BYTES // 8, rows)


def _pieces(target: Tensor | ShardedTensor) -> Iterator[_Piece]:
    if not isinstance(target, ShardedTensor):
        yield _Piece(target, 0, slice(None))
        return
    for shard in target.local_shards():
        row, column = [*shard.metadata.shard_offsets, 0][:2]
        width = shard.tensor.shape[1] if shard.tensor.dim() > 1 else 1
        columns = slice(column, column + width) if shard.tensor.dim() > 1 else slice(None)
        yield _Piece(shard.tensor, row, columns)


def _move(
    pieces: list[_Piece], read: Callable[[int, int], Tensor], height: int, rows: RowMap
) -> None:
    if not pieces:
        return
    first = min(piece.row for piece in pieces)
    last = max(piece.row + len(piece.tensor) for piece in pieces)
    old = rows.find(first, last)
    order = np.flatnonzero(old >= 0)  # new rows, in the order of the old ones
    order = order[np.argsort(old[order], kind="stable")]
    wanted, done = old[order], 0
    while done < len(wanted):
        start = int(wanted[done])
        stop = min(start + height, int(wanted[-1]) + 1)
        end = int(np.searchsorted(wanted, stop))
        block = read(start, stop)  # [N] or [N, D]
        new, at = order[done:end] + first, wanted[done:end] - start
        for piece in pieces:
            inside = (new >= piece.row) & (new < piece.row + len(piece.tensor))
            values = block[torch.from_numpy(at[inside])]
            places = torch.from_numpy(new[inside] - piece.row).to(piece.tensor.device)
            values = values[:, piece.columns] if values.dim() > 1 else values
            piece.tensor[places] = values.to(piece.tensor)
        done = end
