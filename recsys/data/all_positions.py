"""Train on every position of a history, so that an epoch reads each user's events once.

Rows that a later row's history lists are skipped. The targets of that row are its own item and each
history item, each with the history before (SASRec, arXiv 1808.09781).
Shapes: R rows of a split, K rows read, B targets, N items of their histories, T of the K rows.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from embeddings.vocabulary.fixed import mix64
from recsys.data.batch import FullHistories
from recsys.data.parquet.columns import ListColumns, RowColumns
from recsys.data.parquet.values import RAW_GROUP, ROW_POSITION, TARGETS_BEFORE
from recsys.data.row_source import RowSource
from recsys.data.schema import Schema
from recsys.distributed.ranks import Ranks

logger = logging.getLogger(__name__)

BASE = 0x9E3779B97F4A7C15  # base of a polynomial hash modulo 2^64; odd, so that it has an inverse


# Arrays [R], without padding rows: positions, groups, hashed items, and lengths and hashes of
# histories. A history's hash is the sum of its hashed items times BASE ^ age.
Summary = tuple[np.ndarray, ...]


def summary_of(table: pa.Table, rows: RowSource, max_items: int) -> Summary:
    """Return the `Summary` of some rows; a label other than 1 or a long history is a ValueError."""
    schema, columns = rows.schema, RowColumns.of(table)
    assert schema.history is not None
    numbers, lengths = columns.numbers, columns.lengths(schema.history)
    positions = numbers[ROW_POSITION]
    is_row = positions >= 0
    (label,) = schema.of_kind("label")
    if (wrong := is_row & (numbers[label] != 1)).any():
        raise ValueError(
            f"{rows.describe_range(positions[wrong][:1])}: column '{label}' is not 1, and "
            "ranking.target_positions is all, for which items of a history are positive; set "
            "it to last"
        )
    if (longest := int(lengths.max(initial=0))) > max_items:
        raise ValueError(
            f"ranking.recent_items is {max_items}, and a history has {longest} items, which "
            "ranking.target_positions all reads in one pass; raise ranking.recent_items"
        )
    powers = _powers(BASE, longest)
    ends = np.cumsum(lengths)
    ages = np.repeat(ends, lengths) - 1 - np.arange(lengths.sum())
    terms = mix64(columns.values(schema.history)) * powers[ages]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms)])
    hashes = sums[ends] - sums[ends - lengths]
    group = numbers[RAW_GROUP if RAW_GROUP in numbers else schema.group]
    values = positions, group, mix64(numbers[schema.target_item]), lengths, hashes
    return tuple(array[is_row] for array in values)


def targets_before(summaries: Iterable[Summary], num_rows: int) -> np.ndarray:
    """Return how many history items of each row [R] are targets, too; -1 for a skipped row.

    From each user's last row backwards, a row replaces the rows that its history lists.
    """
    positions, groups, items, lengths, hashes = map(np.concatenate, zip(*summaries, strict=True))
    order = np.lexsort((positions, groups))
    groups, lengths = groups[order], lengths[order]
    indices = np.arange(len(order))
    is_first = np.append(True, groups[1:] != groups[:-1])[: len(order)]
    first = np.maximum.accumulate(np.where(is_first, indices, 0))
    begin = indices - lengths
    is_complete = begin >= first
    # The hash of rows [begin, index), comparable to a history's hash, from prefix sums.
    powers, inverses = _powers(BASE, len(order)), _powers(pow(BASE, -1, 1 << 64), len(order))
    sums = np.cumsum(items[order] * inverses)
    sums = np.concatenate([np.zeros(1, np.uint64), sums])
    expected = (sums[indices] - sums[begin.clip(min=0)]) * powers[indices - 1]
    is_complete &= hashes[order] == expected
    num_replaced = np.where(is_complete, lengths, 0).tolist()
    targets = np.full(num_rows, -1)
    index = len(order) - 1
    while index >= 0:
        targets[positions[order[index]]] = num_replaced[index]
        index -= num_replaced[index] + 1
    return targets


def _powers(base: int, count: int) -> np.ndarray:
    """Return the first powers of base modulo 2^64, starting with 1: uint64 [count]."""
    return np.cumprod(np.append(np.ones(1, np.uint64), np.full(count, base, np.uint64)))[:count]


def check_schema(schema: Schema) -> None:
    """Raise a ValueError for a dataset whose history items cannot serve as targets."""
    parallel_ids = schema.histories[0].ids if schema.history else []
    problems = {
        "no column of kind sequence": not schema.history,
        "more than one label": len(schema.of_kind("label")) != 1,
        "a column of kind weight": schema.weight is not None,
        "a column of kind sampled": schema.sampled is not None,
        "columns of kind extra": bool(schema.of_kind("extra")),
        "labels that may be null": any(column.nullable for column in schema.columns.values()),
        f"lists of ids beside '{schema.history}'": bool(parallel_ids),
    }
    if wrong := [problem for problem, is_present in problems.items() if is_present]:
        raise ValueError(
            f"ranking.target_positions is all, but schema.yaml has {' and '.join(wrong)}, so that "
            "items of a history are not targets like that of the row; set it to last"
        )


def all_positions(rows: RowSource, max_items: int, ranks: Ranks) -> AllPositionRows:
    """Return a source of the rows to read, of histories up to `max_items`. A collective."""
    with ranks.raise_on_all_ranks():
        check_schema(rows.schema)
        share = rows.read_once(*rows.share(ranks.rank, ranks.world_size))
        tables = itertools.chain(share, [rows.padding(1)])  # lazy: holds one table at a time
        summaries = [summary_of(table, rows, max_items) for table in tables]
    summaries = list(itertools.chain(*ranks.gather(summaries)))
    read = AllPositionRows(rows, targets_before(summaries, rows.num_rows))
    logger.info(f"{rows.num_rows:,} training rows are read as {read.num_rows:,} histories")
    return read


class AllPositionRows(RowSource):
    """The rows of a source that are not skipped, with the number of targets before each."""

    def __init__(self, source: RowSource, targets_before: np.ndarray) -> None:  # int64 [R]
        self.source, ends = source, np.cumsum([chunk.num_rows for chunk in source.chunks])
        self.targets = np.split(targets_before, ends[:-1])
        counts = [int((targets >= 0).sum()) for targets in self.targets]
        chunks = zip(source.chunks, counts, strict=True)
        super().__init__(source.schema, [replace(chunk, num_rows=num) for chunk, num in chunks])
        self.bad_rows = source.bad_rows

    def read_chunk(self, number: int) -> pa.Table:
        return next(iter(self.read_chunks([number])))

    def read_chunks(self, numbers: Sequence[int]) -> Iterator[pa.Table]:
        for number, table in zip(numbers, self.source.read_chunks(numbers), strict=True):
            targets = self.targets[number]
            yield table.append_column(TARGETS_BEFORE, pa.array(targets)).filter(targets >= 0)

    def describe_range(self, positions: np.ndarray) -> str:
        return self.source.describe_range(positions)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def padding(self, num_rows: int) -> pa.Table:
        none = pa.array(np.zeros(num_rows, np.int64))
        return super().padding(num_rows).append_column(TARGETS_BEFORE, none)


def expanded(rows: RowColumns, schema: Schema) -> tuple[RowColumns, FullHistories | None]:
    """Return a row for each target [B], and the histories read, with ids as `index`.

    Each target has the history before it. Lists of numbers beside a history become zeros, as they
    were measured at the time of the row. Rows of other sources are returned unchanged, with None.
    """
    if TARGETS_BEFORE not in rows.numbers:
        return rows, None
    assert schema.history is not None
    num_before, items = rows.numbers[TARGETS_BEFORE], rows.values(schema.history)
    full_lengths = rows.lengths(schema.history)
    row = np.repeat(np.arange(rows.num_rows), num_before + 1)  # [B]
    first = np.cumsum(num_before + 1) - num_before - 1
    later = (num_before + first)[row] - np.arange(len(row))  # number of later targets of the row
    lengths = full_lengths[row] - later
    starts, ends = (np.cumsum(full_lengths) - full_lengths)[row], np.cumsum(lengths)
    positions = np.repeat(starts - ends + lengths, lengths)
    positions += np.arange(len(positions))
    numbers = {name: values.take(row) for name, values in rows.numbers.items()}
    in_history = (later > 0).nonzero()[0]
    numbers[schema.target_item][in_history] = items[(starts + lengths)[in_history]]
    parallel = {name: np.zeros(len(positions), np.float32) for name in schema.parallel}
    history = ListColumns(np.append(0, ends), {schema.history: items[positions], **parallel})
    other_lists = []
    for lists in rows.lists:
        values = {name: array for name, array in lists.values.items() if name not in history.values}
        if values:
            other_lists.append(ListColumns(lists.offsets, values).take(row))
    full = FullHistories(
        torch.from_numpy(items),
        torch.from_numpy(full_lengths),
        torch.from_numpy(positions),
        rows=torch.from_numpy(row),
        longest=int(full_lengths.max(initial=0)),
        host_lengths=full_lengths,
    )
    return RowColumns(numbers, (history, *other_lists)), full
