"""Count the training rows of each item, and collect ranges of numeric columns, as rows are read.

Ranges show unscaled numbers, which dominate all other inputs. Shapes: N rows, U items with rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from recsys.data.parquet.columns import RowColumns
from recsys.data.parquet.values import ROW_POSITION
from recsys.data.row_source import RowSource
from recsys.data.schema import Schema
from recsys.storage.files import atomic_file

if TYPE_CHECKING:
    from recsys.distributed.ranks import Ranks

COLD_BELOW = 5  # an item with fewer training rows is cold
SUBSETS = ("all", "warm", "cold", "unseen")
BLOCK = 1 << 24  # ids whose counts ranks sum in one collective, 128 MiB
MIN_MERGED = 1 << 20  # smallest number of counted items that are merged at once
BLOCK_VALUES = 1 << 16
LARGEST = 1000.0  # a dense column with a larger absolute value is reported as unscaled
WIDE = 3.0  # numbers of larger absolute value outweigh vectors, whose values are below 1


def frequency_masks(item_counts: np.ndarray) -> dict[str, np.ndarray]:  # [N], int -> [N], bool each
    """Return masks of rows by part of the items; unseen items are also cold."""
    cold = item_counts < COLD_BELOW
    every = np.ones(len(item_counts), dtype=bool)
    return {"all": every, "warm": ~cold, "cold": cold, "unseen": item_counts == 0}


@dataclass(frozen=True)
class ItemCounts:
    """Number of training rows of each item; items without rows take no memory."""

    items: np.ndarray  # int64 [U], ascending
    counts: np.ndarray  # int64 [U]

    @classmethod
    def of_rows(cls, items: np.ndarray) -> ItemCounts:  # int64 [N]
        return cls(*np.unique(items, return_counts=True))

    @classmethod
    def sum_of(cls, terms: Sequence[ItemCounts]) -> ItemCounts:
        items = np.concatenate([np.zeros(0, np.int64), *(term.items for term in terms)])
        counts = np.concatenate([np.zeros(0, np.int64), *(term.counts for term in terms)])
        order = np.argsort(items)
        items, counts = items[order], counts[order]
        begin = np.flatnonzero(np.append(True, items[1:] != items[:-1])[: len(items)])
        return cls(items[begin], np.add.reduceat(counts, begin) if len(items) else counts)

    @classmethod
    def load(cls, path: Path) -> ItemCounts:
        return cls(*np.load(path, mmap_mode="r"))

    def save(self, path: Path) -> None:
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.save(file, np.stack([self.items, self.counts]))

    def of(self, items: np.ndarray) -> np.ndarray:  # int64 [N] -> int64 [N]
        if not len(self.items):
            return np.zeros(len(items), np.int64)
        index = np.searchsorted(self.items, items).clip(max=len(self.items) - 1)
        return np.where(self.items[index] == items, self.counts[index], 0)

    def sum_of_ranks(self, num_items: int | None, ranks: Ranks) -> ItemCounts:
        """Return the sums over all ranks on rank 0, and empty counts elsewhere. A collective."""
        import torch
        import torch.distributed as dist

        from recsys.distributed.gather import gather_rows_to_first

        if num_items is None:
            rank_counts = torch.from_numpy(np.stack([self.items, self.counts], axis=1))
            gathered = ItemCounts(*gather_rows_to_first(rank_counts, ranks.group).numpy().T)
            return ItemCounts.sum_of([gathered] if ranks.is_first else [])
        items, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        occupied = torch.zeros(-(-num_items // BLOCK), dtype=torch.uint8)
        occupied[torch.from_numpy(self.items // BLOCK)] = 1
        dist.all_reduce(occupied, op=dist.ReduceOp.MAX, group=ranks.group)
        for start in (BLOCK * np.flatnonzero(occupied.numpy())).tolist():
            block = np.zeros(min(BLOCK, num_items - start), np.int64)
            first, last = np.searchsorted(self.items, [start, start + BLOCK])
            block[self.items[first:last] - start] = self.counts[first:last]
            dist.reduce(torch.from_numpy(block), group_dst=0, group=ranks.group)
            if ranks.is_first:
                occurring = np.flatnonzero(block)
                items.append(occurring + start)
                counts.append(block[occurring])
        return ItemCounts(np.concatenate(items), np.concatenate(counts))


def target_counts(
    counts: ItemCounts, items: np.ndarray, schema: Schema
) -> np.ndarray:  # int64 [N] -> int64 [N]
    """Return each target item's number of training rows; 0 for the shared row of unknown ids."""
    vocabulary, row_counts = schema.vocabulary_of(schema.target_item), counts.of(items)
    if vocabulary is None or vocabulary.kind != "exact":
        return row_counts
    return np.where(items == schema.limit(schema.target_item) - 1, 0, row_counts)


def rows_that_count(table: pa.Table, schema: Schema) -> np.ndarray:  # table R rows -> bool [R]
    """Return a mask of the rows that are not padding and have a weight above 0."""
    is_row = table[ROW_POSITION].to_numpy() >= 0
    return is_row if schema.weight is None else is_row & (table[schema.weight].to_numpy() > 0)


def count_items(
    rows: RowSource, rank: int, world_size: int, also: Callable[[pa.Table], None] | None = None
) -> ItemCounts:
    """Count the items of a rank's rows that count and are not sampled; pass chunks to `also`."""
    schema, counts, waiting = rows.schema, ItemCounts.sum_of([]), list[ItemCounts]()
    for table in rows.read_once(*rows.share(rank, world_size)):
        if also is not None:
            also(table)
        is_counted = rows_that_count(table, schema)
        if schema.sampled is not None:
            is_counted &= table[schema.sampled].to_numpy() == 0
        waiting.append(ItemCounts.of_rows(table[schema.target_item].to_numpy()[is_counted]))
        if sum(len(block.items) for block in waiting) > max(len(counts.items), MIN_MERGED):
            counts, waiting = ItemCounts.sum_of([counts, *waiting]), []
    return ItemCounts.sum_of([counts, *waiting])


@dataclass
class NumberRange:
    """Range, number and sums of the values of a column."""

    lowest: float = math.inf
    highest: float = -math.inf
    count: int = 0
    total: float = 0.0
    squares: float = 0.0  # sum of squares

    def add(self, values: np.ndarray) -> None:
        total = float(values.sum(dtype=np.float64))
        # In blocks, so that their float64 copies stay in the processor's cache.
        blocks = (values[n : n + BLOCK_VALUES] for n in range(0, len(values), BLOCK_VALUES))
        squares = sum(float(np.square(block, dtype=np.float64).sum()) for block in blocks)
        lowest, highest = float(values.min(initial=math.inf)), float(values.max(initial=-math.inf))
        self.include(NumberRange(lowest, highest, len(values), total, squares))

    def include(self, other: NumberRange) -> None:
        self.lowest = min(self.lowest, other.lowest)
        self.highest = max(self.highest, other.highest)
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def variance(self) -> float:
        return max(self.squares / self.count - self.mean**2, 0.0)

    @property
    def is_wide(self) -> bool:
        return max(-self.lowest, self.highest) > WIDE

    def __str__(self) -> str:
        return f"{self.lowest:g} to {self.highest:g}"


class NumberRanges:
    """Ranges of each dense column and each list of numbers, collected while rows are read."""

    def __init__(self, schema: Schema) -> None:
        self.dense = schema.of_kind("dense")
        lists = [name for history in schema.histories for name in history.numbers]
        self.by_column = {name: NumberRange() for name in (*self.dense, *lists)}

    def add(self, table: pa.Table) -> None:
        """Include the rows of a table, except padding rows."""
        is_row, rows = table[ROW_POSITION].to_numpy() >= 0, RowColumns.of(table)
        for name, column in self.by_column.items():
            column.add(table[name].to_numpy()[is_row] if name in self.dense else rows.values(name))

    def gather(self, ranks: Ranks) -> dict[str, NumberRange]:
        """Return the ranges over the rows of all ranks, on every rank. A collective."""
        gathered = ranks.gather(self.by_column)
        self.by_column = {name: NumberRange() for name in self.by_column}
        for name, column in self.by_column.items():
            for ranges in gathered:
                column.include(ranges[name])
        return self.by_column


def dense_finding(column: str, lowest: float, highest: float) -> tuple[str, str] | None:
    """Return the problem of a column of this range and its fix; None without a problem."""
    if lowest == highest:
        problem = f"dense column '{column}' is {lowest:g} in all training rows"
        return problem, "it is no help; take it out of schema.yaml"
    if max(abs(lowest), abs(highest)) > LARGEST:
        problem = f"dense column '{column}' goes from {lowest:g} to {highest:g}"
        return problem, "take its logarithm or scale it to about 1, or it drowns all else"
    return None
