"""Summarizes one split of a dataset, read once from end to end in bounded memory.

Rows are read as training reads them; those that it cannot use are left out and counted.

Shapes: R rows of a table read at once, N keys.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from recsys.data.filesystem import Location
from recsys.data.item_frequency import ItemCounter, ItemCounts
from recsys.data.parquet.bad_rows import by_reason
from recsys.data.parquet.columns import RowColumns
from recsys.data.parquet.rows import ParquetRows
from recsys.data.parquet.values import RAW_GROUP, ROW_POSITION
from recsys.data.schema import Schema
from recsys.diagnostics.dataset.key_counts import KeyCounts, hash_lists, hash_numbers, join_hashes
from recsys.diagnostics.dataset.numbers import IdRange, Lengths, Range
from recsys.diagnostics.dataset.time_columns import time_ranges


@dataclass
class SplitSummary:
    """Contents of a split.

    items: counts rows by target item, rows with a drawn item left out.
    keys: counts of ids by column (raw ids if training assigns their rows), of groups, of pairs of
        group and item, and of whole rows.
    target_in_history: rows with a history that holds their own target.
    bad_rows: rows that training cannot use, by file, column and reason.
    """

    split: str
    rows: int
    files: int
    row_groups: int
    bytes: int
    items: ItemCounter = field(default_factory=ItemCounter)
    usable_rows: int = 0
    # Of labels and dense columns.
    numbers: dict[str, Range] = field(default_factory=partial(defaultdict, Range))
    ids: dict[str, IdRange] = field(default_factory=partial(defaultdict, IdRange))
    lists: dict[str, Lengths] = field(default_factory=partial(defaultdict, Lengths))
    keys: dict[str, KeyCounts] = field(default_factory=partial(defaultdict, KeyCounts))
    times: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    target_in_history: int = 0
    bad_rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def item_counts(self) -> ItemCounts:
        """Return the number of rows of each target item."""
        return self.items.total()


GROUPS, PAIRS, ROWS = "groups", "group and item", "rows"


def summarize_split(root: Location, split: str, schema: Schema) -> SplitSummary:
    """Read and summarize a split.

    Raises:
        ValueError: as in training: there are no files, or a file cannot be read, lacks a column or
            has one of a wrong type.
    """
    rows = ParquetRows.of_split(root, split, schema, on_bad_row="skip")
    found = SplitSummary(
        split=split,
        rows=rows.num_rows,
        files=len({str(group.file) for group in rows.row_groups}),
        row_groups=len(rows.row_groups),
        bytes=sum(group.num_bytes for group in rows.row_groups),
    )
    for table in rows.read(0, rows.num_rows):
        columns = RowColumns.of(table)
        usable = np.flatnonzero(columns.numbers[ROW_POSITION] >= 0)
        if len(usable) < columns.num_rows:
            columns = columns.take(usable)
        if len(usable):
            _add_rows(found, schema, columns)
    _, found.bad_rows = by_reason(rows.bad_rows.found)
    found.times = time_ranges(rows, schema)
    return found


def _add_rows(found: SplitSummary, schema: Schema, columns: RowColumns) -> None:
    found.usable_rows += columns.num_rows
    for name, column in schema.columns.items():
        if column.kind in ("label", "dense", "extra", "weight", "sampled"):
            numbers = columns.numbers[name]
            found.numbers[name].add(numbers[~np.isnan(numbers)])
        else:
            _add_ids(found, schema, name, columns)
    targets = columns.numbers[schema.target_item]
    if schema.sampled is not None:
        targets = targets[columns.numbers[schema.sampled] == 0]
    found.items.add(targets)
    found.target_in_history += _rows_with_target(schema, columns)
    group = RAW_GROUP if RAW_GROUP in columns.numbers else schema.group
    groups = hash_numbers(columns.numbers[group])
    targets = hash_numbers(columns.numbers[schema.target_item])
    found.keys[GROUPS].add(groups)
    found.keys[PAIRS].add(join_hashes(groups, targets))
    found.keys[ROWS].add(_hashes_of_rows(columns))


def _add_ids(found: SplitSummary, schema: Schema, name: str, columns: RowColumns) -> None:
    ids = columns.numbers[name] if name in columns.numbers else columns.values(name)
    vocabulary = schema.vocabulary_of(name)
    has_unknown = vocabulary is not None and vocabulary.kind == "exact"
    unknown_row = schema.limit(name) - 1 if has_unknown else None
    found.ids[name].add(ids, unknown_row)
    found.keys[name].add(hash_numbers(ids))
    if schema.columns[name].kind != "id":
        num_hashes = 1 if vocabulary is None else vocabulary.num_hashes
        found.lists[name].add(columns.lengths(name) // num_hashes)


def _rows_with_target(schema: Schema, columns: RowColumns) -> int:
    """Count the rows with their target in any history that has the target item's table."""
    has_target = np.zeros(columns.num_rows, bool)
    for history in schema.of_kind("sequence"):
        if schema.table_of(history) == schema.target_item:
            rows = np.repeat(np.arange(columns.num_rows), columns.lengths(history))
            hits = columns.values(history) == columns.numbers[schema.target_item][rows]
            has_target[rows[hits]] = True
    return int(has_target.sum())


def _hashes_of_rows(columns: RowColumns) -> np.ndarray:  # uint64 [R]
    """Hash each row over all columns that the schema names."""
    parts = [
        hash_numbers(values) for name, values in columns.numbers.items() if name != ROW_POSITION
    ]
    for lists in columns.lists:
        parts += [hash_lists(values, lists.offsets) for values in lists.values.values()]
    return join_hashes(*parts)
