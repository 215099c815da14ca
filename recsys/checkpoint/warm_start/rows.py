"""Maps the rows of a new run's tables to those of the same ids in another run, and moves them.

Rows are matched by raw id if a table has a map, else by their number; -1: initial values.
Shapes: R rows, N rows of a range or block, D dimension, S sets of a bounded vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from embeddings.vocabulary.bounded import UsedRows, rows_in_resized
from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.checkpoint.reader import BLOCK_BYTES, StoredTensor
from recsys.checkpoint.run_schema import exact_maps
from recsys.checkpoint.state import LocalShard, local_shards
from recsys.checkpoint.warm_start.source import Differences, Source
from recsys.data.schema import Schema
from recsys.distributed.ranks import Ranks

SETS_PER_READ = 2**16


@dataclass(frozen=True)
class RowMap:
    """Rows of the other run by those of the new one."""

    is_identity: bool  # every row keeps its place, and there are no more and no fewer
    num_rows: int  # of the new table
    # Maps new rows `[start, stop)` to old rows, int64 [N], or -1; keeps its last result for reuse.
    find: Callable[[int, int], np.ndarray]

    @classmethod
    def identity(cls, num_rows: int) -> Self:
        return cls(True, num_rows, np.arange)

    def new_rows(self, old: np.ndarray) -> np.ndarray:  # int64 [N] -> [N], -1: has no place
        """Return the new rows of some old ones; for items, whose ids every rank holds anyway."""
        old_of_new = self.find(0, self.num_rows)
        num_old_rows = max(old.max(initial=-1), old_of_new.max(initial=-1)) + 1
        new_of_old = np.full(num_old_rows, -1)
        mapped_rows = np.flatnonzero(old_of_new >= 0)
        new_of_old[old_of_new[mapped_rows]] = mapped_rows
        return new_of_old[old]


def row_map(table: str, source: Source, schema: Schema, ranks: Ranks) -> RowMap | None:
    """Return the map of a table, None if there is none; list what differs. A collective."""
    subject, fix = f"table '{table}'", f"or --warm-start-skip '*.{table}.weight'"
    differences = source.differences
    stored, current = source.schema.vocabulary_of(table), schema.vocabulary_of(table)
    old_rows, num_rows = source.schema.limit(table), schema.limit(table)
    kinds = [
        "rows, without a vocabulary" if ids is None else f"of a vocabulary of kind {ids.kind}"
        for ids in (stored, current)
    ]
    if kinds[0] != kinds[1]:
        change = f"its ids were {kinds[0]}, and are {kinds[1]}"
        differences.refuse(subject, change, f"keep the kind of vocabulary, {fix}")
        return None
    if stored is None or current is None:
        return _map_without_vocabulary(subject, old_rows, num_rows, fix, differences)
    if current.kind == "exact":
        old, new = exact_maps(source.schema)[table], exact_maps(schema)[table]
        return _map_exact(subject, old, new, fix, differences)
    if current.kind == "bounded":
        return _map_bounded(table, source, num_rows, current.half_life, ranks)
    old_hash = old_rows, stored.num_hashes, stored.seed
    new_hash = num_rows, current.num_hashes, current.seed
    if old_hash == new_hash:
        return RowMap.identity(num_rows)
    change = f"rows, hashes and seed of its vocabulary were {old_hash}, and are {new_hash}"
    differences.refuse(subject, f"{change}: its ids have other rows", f"set them back, {fix}")
    return None


def _map_without_vocabulary(
    subject: str, old_rows: int, num_rows: int, fix: str, differences: Differences
) -> RowMap | None:
    if num_rows < old_rows:
        change = f"had {old_rows:,} rows, num_embeddings is {num_rows:,}"
        differences.refuse(subject, change, f"set it to at least {old_rows:,}, {fix}")
        return None

    @lru_cache(maxsize=1)
    def find(start: int, stop: int) -> np.ndarray:
        rows = np.arange(start, stop)
        return np.where(rows < old_rows, rows, -1)

    if num_rows > old_rows:
        change = f"grew from {old_rows:,} to {num_rows:,} rows"
        differences.add(subject, change, f"{num_rows - old_rows:,} rows with initial values")
    return RowMap(num_rows == old_rows, num_rows, find)


def _map_exact(
    subject: str, old: ExactVocabulary, new: ExactVocabulary, fix: str, differences: Differences
) -> RowMap | None:
    """Map a table by raw id; the row of unknown ids goes to that of the new table."""
    try:
        old_of_new = old.find(new.ids)
    except ValueError as error:
        differences.refuse(subject, str(error), f"write ids of one type, {fix}")
        return None
    num_kept = int((old_of_new >= 0).sum())
    if len(old) and not num_kept:
        problem = f"none of the run's {len(old):,} ids is among the {len(new):,} of the data"
        fix = f"bring the run's vocabulary into the dataset and extend it, {fix}"
        differences.refuse(subject, problem, fix)
        return None

    @lru_cache(maxsize=1)
    def find(start: int, stop: int) -> np.ndarray:
        rows = np.full(stop - start, -1)
        ids = old_of_new[start:stop]
        rows[: len(ids)] = ids
        if start <= new.unknown_row < stop:
            rows[new.unknown_row - start] = old.unknown_row
        return rows

    is_equal = len(old) == len(new) == num_kept and old.is_extension_of(new)
    is_identity = is_equal and old.num_embeddings == new.num_embeddings
    if not is_identity:
        num_moved = int((np.flatnonzero(old_of_new >= 0) != old_of_new[old_of_new >= 0]).sum())
        differences.add(
            subject,
            f"{old.num_embeddings:,} rows and {len(old):,} ids before, {new.num_embeddings:,} and "
            f"{len(new):,} now",
            f"{num_kept:,} ids keep their rows ({num_moved:,} at another place), "
            f"{len(new) - num_kept:,} are new with initial values, {len(old) - num_kept:,} are "
            "gone",
        )
    return RowMap(is_identity, new.num_embeddings, find)


def _map_bounded(
    table: str, source: Source, num_rows: int, half_life: float, ranks: Ranks
) -> RowMap:
    """Map a table whose ids were learned while training. A collective."""
    old_rows = source.schema.limit(table)
    if num_rows == old_rows:
        return RowMap.identity(num_rows)

    @lru_cache(maxsize=1)
    def find(start: int, stop: int) -> np.ndarray:
        rows = rows_in_resized(_used_rows(source, table), num_rows, half_life, start, stop)
        if start <= num_rows - 1 < stop:
            rows[num_rows - 1 - start] = old_rows - 1
        return rows

    with ranks.raise_on_all_ranks():
        first, last = (num_rows * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
        num_local = int((find(first, last) >= 0).sum())
        num_ids = sum(int((rows.last_used >= 0).sum()) for rows in _used_rows(source, table))
    num_kept = sum(ranks.gather(num_local)) - 1  # without the row of unknown ids
    change = f"{old_rows:,} rows and {num_ids:,} ids before, {num_rows:,} rows now"
    rule = f"{num_kept:,} ids keep their rows at another place, {num_ids - num_kept:,} have no room"
    source.differences.add(f"table '{table}'", change, rule)
    return RowMap(False, num_rows, find)


def _used_rows(source: Source, table: str) -> Iterator[UsedRows]:
    names = ("ids", "last_used", "scores")
    tensors = [source.model.tensor(f"vocabulary.{table}.{name}") for name in names]
    num_sets, rows_per_set = tensors[0].size
    for start in range(0, num_sets, SETS_PER_READ):
        stop = min(start + SETS_PER_READ, num_sets)
        values = [tensor.rows(start, stop).flatten().numpy() for tensor in tensors]
        yield UsedRows(start * rows_per_set, *values)


def size_of(tensor: Tensor | ShardedTensor) -> tuple[int, ...]:
    """Return the size of a whole tensor."""
    return tuple(tensor.metadata().size if isinstance(tensor, ShardedTensor) else tensor.shape)


@torch.no_grad()
def move_rows(target: Tensor | ShardedTensor, stored: StoredTensor, rows: RowMap) -> None:
    """Fill the rows of `target`, [R] or [R, D], that have an old row in `stored`."""
    row_bytes = 8 * math.prod(stored.size[1:])
    _move(local_shards(target), stored.rows, max(1, BLOCK_BYTES // row_bytes), rows)


@torch.no_grad()
def move_sets(target: Tensor | ShardedTensor, stored: StoredTensor, rows: RowMap) -> None:
    """Fill an entry of a bounded vocabulary, [S, R / S], with one number per row of its table."""
    per_set, old_per_set = size_of(target)[1], stored.size[1]
    shards = [
        LocalShard(shard.tensor.view(-1), shard.row * per_set) for shard in local_shards(target)
    ]

    def read(start: int, stop: int) -> Tensor:
        first, last = start // old_per_set, -(-stop // old_per_set)
        return stored.rows(first, last).flatten()[start - first * old_per_set :][: stop - start]

    _move(shards, read, BLOCK_BYTES // 8, rows)


def _move(
    shards: list[LocalShard], read: Callable[[int, int], Tensor], height: int, rows: RowMap
) -> None:
    if not shards:
        return
    first = min(shard.row for shard in shards)
    last = max(shard.row + len(shard.tensor) for shard in shards)
    old_of_new = rows.find(first, last)
    order = np.flatnonzero(old_of_new >= 0)  # new rows, in the order of the old ones
    order = order[np.argsort(old_of_new[order], kind="stable")]
    old_rows, begin = old_of_new[order], 0
    while begin < len(old_rows):
        start = int(old_rows[begin])
        stop = min(start + height, int(old_rows[-1]) + 1)
        end = int(np.searchsorted(old_rows, stop))
        block = read(start, stop)  # [N] or [N, D]
        new_rows, block_rows = order[begin:end] + first, old_rows[begin:end] - start
        for shard in shards:
            is_inside = (new_rows >= shard.row) & (new_rows < shard.row + len(shard.tensor))
            values = block[torch.from_numpy(block_rows[is_inside])]
            targets = torch.from_numpy(new_rows[is_inside] - shard.row).to(shard.tensor.device)
            if values.dim() > 1:
                values = values[:, shard.column : shard.column + shard.tensor.shape[1]]
            shard.tensor[targets] = values.to(shard.tensor)
        begin = end
