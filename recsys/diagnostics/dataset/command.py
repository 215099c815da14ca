"""Runs `recsys explain-data DATA [--on-bad-row skip] [--json FILE]`: tables, and warnings last."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from embeddings.plan_text import align_columns
from recsys.data.item_frequency import count_items
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.bad_rows import OnBadRow, no_row_left
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.diagnostics.dataset.findings import MINUTES, Finding, find
from recsys.diagnostics.dataset.item_summary import QUANTILES, ColumnSummary
from recsys.diagnostics.dataset.summary import (
    GROUPS,
    SPLITS,
    DatasetSummary,
    SplitSummary,
    summarize_dataset,
    to_json,
)
from recsys.distributed.log import print_table
from recsys.storage.files import write_whole
from recsys.storage.location import Location
from recsys.storage.output_file import check_output

logger = logging.getLogger(__name__)


def explain_data(
    data: str, on_bad_row: OnBadRow = "error", json_file: Path | None = None
) -> DatasetSummary:
    """Read a dataset, print its summary, and write the numbers to `json_file`.

    A dataset or row that training would refuse is a ValueError, as is an unusable `json_file`; if
    `on_bad_row` is skip, only a split without any usable row.
    """
    if json_file is not None:
        check_output(json_file)
    summary = summarize_dataset(data)
    findings = find(summary)
    print_table(format_dataset(summary, findings))
    if json_file is not None:
        write_whole(json_file, to_json(summary, findings))
        logger.info("written to %s", json_file)
    if summary.has_bad_rows and on_bad_row == "error":
        _raise_first(data, summary)
    for split in summary.splits.values():
        if not split.usable_rows:
            raise no_row_left(split.rows, split.split, split.bad_rows)
    return summary


def _raise_first(data: str, summary: DatasetSummary) -> None:
    """Raise the error that training would raise, reading in the same order."""
    root = Location.of(data)
    schema = load_schema(root)
    if schema.items is not None:
        ItemTable(root, schema)
        for column in summary.items.columns.values() if summary.items is not None else ():
            if column.problem:
                raise ValueError(column.problem)
    for split in SPLITS:
        count_items(ParquetRows.of_split(root, split, schema), 0, 1)


SHARES = {
    "of_top_items": "rows of the top 1 % of items",
    "cold": "rows of cold items (fewer than 5 training rows)",
    "unseen": "rows of unseen items (no training row)",
    "of_known_groups": "rows of groups seen in training",
    "without_item_row": "rows of items without a row in items/",
    "repeated_pairs": "repeats of group and item",
    "repeated_rows": "exact repeats of rows",
    "in_train": "exact copies of training rows",
    "target_in_history": "rows with their target in their history",
}


def format_dataset(summary: DatasetSummary, findings: Sequence[Finding]) -> str:
    """Return all tables, the findings last."""
    parts = (_splits, _columns, _tables, _items)
    blocks = [str(summary.root), *(part(summary) for part in parts)]
    lines = [f"warning: {finding.what}; fix: {finding.fix}" for finding in findings]
    blocks.append("\n".join(lines or ["no warnings"]))
    return "\n\n".join(block for block in blocks if block)


def _splits(summary: DatasetSummary) -> str:
    splits = list(summary.splits.values())
    rows: list[Sequence[str]] = [("", *summary.splits)]

    def add(name: str, value: Callable[[SplitSummary], str]) -> None:
        rows.append((name, *(value(split) if split.usable_rows else "-" for split in splits)))

    rows.append(("rows", *(f"{split.rows:,}" for split in splits)))
    bad_rows = [sum(entry["rows"] for entry in split.bad_rows) for split in splits]
    rows.append(("rows that cannot be used", *(f"{number:,}" for number in bad_rows)))
    rows.append(("files", *(f"{split.files:,}" for split in splits)))
    for label in summary.schema.of_kind("label"):
        is_rate = summary.schema.columns[label].loss in (None, "bce")
        name, style = ("rate", ".2%") if is_rate else ("mean", ".4g")
        add(f"{name} of label {label}", lambda split: f"{split.numbers[label]['mean']:{style}}")  # noqa: B023
        if summary.schema.columns[label].nullable:
            add(
                f"rows without label {label}",
                lambda split: f"{split.usable_rows - split.numbers[label]['count']:,}",  # noqa: B023
            )
    add("groups", lambda split: f"{split.distinct[GROUPS]:,}")
    add("target items", lambda split: f"{len(split.item_counts.items):,}")
    for key, name in SHARES.items():
        if any(key in split.shares for split in splits):
            add(name, lambda split: _percent(split.shares.get(key)))  # noqa: B023
    for column in dict.fromkeys(column for split in splits for column in split.times):
        for name, end in (("from", 0), ("to", 1)):
            times = [split.times.get(column) for split in splits]
            cells = ["-" if ends is None else f"{ends[end]:{MINUTES}}" for ends in times]
            rows.append((f"{column} {name}", *cells))
    return align_columns(rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _columns(summary: DatasetSummary) -> str:
    lists: list[Sequence[str]] = [("lengths of lists", "split", "mean", *QUANTILES, "max", "empty")]
    numbers: list[Sequence[str]] = [("numbers", "split", "min", "mean", "max", "deviation")]
    columns = [name for name, column in summary.schema.columns.items() if column.kind != "label"]
    for name, split in product(columns, summary.splits.values()):
        if name in split.lists and (lengths := split.lists[name].summary()):
            quantiles = [f"{lengths[key]:,}" for key in (*QUANTILES, "max")]
            mean, empty = f"{lengths['mean']:.1f}", _percent(lengths["empty_share"])
            lists.append((name, split.split, mean, *quantiles, empty))
        elif name in split.numbers:
            figures = [split.numbers[name][key] for key in numbers[0][2:]]
            cells = ["-" if figure is None else f"{figure:.4g}" for figure in figures]
            numbers.append((name, split.split, *cells))
    return "\n\n".join(align_columns(rows) for rows in (lists, numbers) if len(rows) > 1)


def _tables(summary: DatasetSummary) -> str:
    rows = [("table", "rows", "vocabulary", "ids used", "unused", "ids from", "to")]
    for name, use in summary.tables.items():
        ids = [split.ids[name] for split in summary.splits.values() if name in split.ids]
        limits = [column[end] for column in ids for end in ("least", "greatest") if column["count"]]
        ends = (f"{min(limits):,}", f"{max(limits):,}") if limits else ("-", "-")
        if use.vocabulary == "bounded":  # its ids are raw, not rows
            ends = ("-", "-")
        cells = (f"{use.ids:,}", _percent(use.unused_share))
        rows.append((name, f"{use.rows:,}", use.vocabulary or "-", *cells, *ends))
    return align_columns(rows)


def _items(summary: DatasetSummary) -> str:
    if summary.items is None:
        return ""
    items = summary.items
    text = f"{items.rows:,} items, {summary.items_without_rows():,} of them in no impression"
    rows = [("content", "kind", "items without", "what the others have")]
    for name, column in items.columns.items():
        missing = _percent(column.missing_share(items.rows))
        rows.append((name, column.kind, missing, _content(column)))
    return f"{text}\n{align_columns(rows)}" if len(rows) > 1 else text


def _content(column: ColumnSummary) -> str:
    if column.kind == "image":
        return f"{column.broken:,} of {column.opened:,} opened are no images"
    if column.kind == "category":
        return f"{column.values:,} different ones"
    lengths: dict[str, Any] = column.lengths.summary()
    if not lengths:
        return "-"
    if column.kind == "text":
        quantiles = ", ".join(f"{name} {lengths[name]:,}" for name in (*QUANTILES, "max"))
        return f"characters: {quantiles}"
    widths = ", ".join(f"{width:,}" for width, _ in column.widths.most_common(3))
    tokens = "" if lengths["max"] == 1 else f"{lengths['mean']:.1f} tokens of "
    return f"{tokens}{widths} numbers"
