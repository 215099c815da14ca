"""Summarizes a whole dataset: splits, items, and overlaps between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys.data.filesystem import Location
from recsys.data.item_frequency import ItemCounts, frequency_masks
from recsys.data.schema import Schema, load_schema
from recsys.diagnostics.dataset.item_summary import ItemSummary, summarize_items
from recsys.diagnostics.dataset.key_counts import KeyCounts
from recsys.diagnostics.dataset.split_summary import (
    GROUPS,
    PAIRS,
    ROWS,
    SplitSummary,
    summarize_split,
)

SPLITS = ("train", "valid", "test")


@dataclass
class TableUse:
    """Number of rows of a table, and of the different ids in all splits that use them.

    `is_exact`: False if a sample of the ids was counted because there are many.
    """

    rows: int
    ids: int
    is_exact: bool
    vocabulary: str | None

    @property
    def unused_share(self) -> float:
        """Return the share of rows without an id that uses them."""
        return max(0.0, 1 - self.ids / self.rows)


@dataclass
class DatasetSummary:
    """Everything that `recsys explain-data` prints."""

    root: Location
    schema: Schema
    splits: dict[str, SplitSummary]
    items: ItemSummary | None
    tables: dict[str, TableUse]

    @property
    def has_bad_rows(self) -> bool:
        """Return whether any split or the items have rows that training cannot use."""
        of_items = self.items is not None and (
            bool(self.items.bad_rows) or any(each.problem for each in self.items.columns.values())
        )
        return of_items or any(split.bad_rows for split in self.splits.values())

    def shares_of_rows(self, split: str) -> dict[str, float]:
        """Return shares of a split's rows: cold and unseen items, repeats, known groups, ..."""
        found, train = self.splits[split], self.splits["train"]
        items, counts = found.item_counts.items, found.item_counts.counts
        of = frequency_masks(train.item_counts.of(items))
        of_items = max(int(counts.sum()), 1)  # without drawn rows
        rows = max(found.usable_rows, 1)
        shares = {
            **{part: float(counts[of[part]].sum() / of_items) for part in ("cold", "unseen")},
            "repeated_rows": found.keys[ROWS].repeats / rows if found.usable_rows else 0.0,
            "repeated_pairs": found.keys[PAIRS].repeats / rows if found.usable_rows else 0.0,
            "target_in_history": found.target_in_history / rows,
            "of_top_items": share_of_most_frequent(counts),
        }
        if self.items is not None:
            without_row = ~np.isin(items, self.items.ids)
            shares["without_item_row"] = float(counts[without_row].sum() / of_items)
        if split != "train" and found.usable_rows:
            groups = found.keys[GROUPS], train.keys.get(GROUPS, KeyCounts())
            shares["of_known_groups"] = groups[0].share_of_total_in(groups[1]) or 0.0
            rows_of_train = train.keys.get(ROWS, KeyCounts())
            shares["in_train"] = found.keys[ROWS].share_of_total_in(rows_of_train) or 0.0
        return shares

    def items_without_rows(self) -> int:
        """Count the items with content that occur in no impression."""
        assert self.items is not None
        counts = ItemCounts.sum_of([split.item_counts for split in self.splits.values()])
        return int((counts.of(self.items.ids) == 0).sum())


def share_of_most_frequent(counts: np.ndarray, share: float = 0.01) -> float:
    """Return the share of all rows that belong to the most frequent `share` of the items.

    `counts` are the rows of each item that has any, int64 [U].
    """
    if not len(counts):
        return 0.0
    return float(np.sort(counts)[::-1][: max(1, round(share * len(counts)))].sum() / counts.sum())


def summarize_dataset(data: str) -> DatasetSummary:
    """Read a dataset from end to end, in bounded memory.

    Args:
        data: dataset, a folder or URL.

    Raises:
        ValueError: training could not read the dataset; the message is the same.
    """
    root = Location.of(data)
    schema = load_schema(root)
    splits = {split: summarize_split(root, split, schema) for split in SPLITS}
    items = summarize_items(root, schema)
    return DatasetSummary(root, schema, splits, items, _table_uses(schema, splits))


def _table_uses(schema: Schema, splits: dict[str, SplitSummary]) -> dict[str, TableUse]:
    uses = {}
    for table, column in schema.columns.items():
        if column.num_embeddings is None:
            continue
        features = [
            name
            for name, other in schema.columns.items()
            if other.kind in ("id", "ids", "sequence") and schema.table_of(name) == table
        ]
        together = KeyCounts()
        for split in splits.values():
            for keys in (split.keys[name] for name in features if name in split.keys):
                together.halve_to(keys.halvings)  # samples must be equally sparse
                together.add(keys.keys)
        vocabulary = column.vocabulary.kind if column.vocabulary is not None else None
        uses[table] = TableUse(
            column.num_embeddings, together.distinct, together.is_exact, vocabulary
        )
    return uses


def to_json(found: DatasetSummary, findings: list[Any]) -> dict[str, Any]:
    """Return summary and findings as plain values for JSON."""
    splits = {}
    for name, split in found.splits.items():
        splits[name] = {
            "rows": split.rows,
            "usable_rows": split.usable_rows,
            "files": split.files,
            "row_groups": split.row_groups,
            "bytes": split.bytes,
            "numbers": {column: values.summary() for column, values in split.numbers.items()},
            "ids": {column: values.summary() for column, values in split.ids.items()},
            "lists": {column: values.summary() for column, values in split.lists.items()},
            "distinct": {kind: keys.distinct for kind, keys in split.keys.items()},
            "times": {
                column: [str(moment) for moment in ends] for column, ends in split.times.items()
            },
            "shares_of_rows": found.shares_of_rows(name),
            "bad_rows": split.bad_rows,
        }
    tables = {
        name: {**vars(use), "unused_share": use.unused_share} for name, use in found.tables.items()
    }
    return {
        "data": str(found.root),
        "splits": splits,
        "tables": tables,
        "items": None if found.items is None else _items_to_json(found, found.items),
        "findings": [vars(finding) for finding in findings],
    }


def _items_to_json(found: DatasetSummary, items: ItemSummary) -> dict[str, Any]:
    columns = {
        name: {
            **vars(column),
            "lengths": column.lengths.summary(),
            "missing_share": column.missing_share(items.rows),
        }
        for name, column in items.columns.items()
    }
    return {
        "rows": items.rows,
        "usable_rows": len(items.ids),
        "without_impressions": found.items_without_rows(),
        "columns": columns,
        "bad_rows": items.bad_rows,
    }
