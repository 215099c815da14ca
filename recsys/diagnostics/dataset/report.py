"""Formats a dataset's summary as text tables, and its findings as warnings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from embeddings.plan_text import align_columns
from recsys.diagnostics.dataset.dataset_summary import DatasetSummary
from recsys.diagnostics.dataset.findings import Finding
from recsys.diagnostics.dataset.item_summary import ColumnSummary
from recsys.diagnostics.dataset.key_counts import KeyCounts
from recsys.diagnostics.dataset.numbers import QUANTILES
from recsys.diagnostics.dataset.split_summary import GROUPS, SplitSummary
from recsys.diagnostics.dataset.time_columns import in_words

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


def format_dataset(found: DatasetSummary, findings: Sequence[Finding]) -> str:
    """Return all tables, the findings last."""
    blocks = [str(found.root), _splits(found), _columns(found), _tables(found), _items(found)]
    lines = [f"warning: {finding.what}; fix: {finding.fix}" for finding in findings]
    blocks.append("\n".join(lines or ["no warnings"]))
    return "\n\n".join(block for block in blocks if block)


def _splits(found: DatasetSummary) -> str:
    splits = list(found.splits.values())
    rows: list[Sequence[str]] = [("", *found.splits)]

    def add(name: str, value: Callable[[SplitSummary], str]) -> None:
        rows.append((name, *(value(split) if split.usable_rows else "-" for split in splits)))

    rows.append(("rows", *(f"{split.rows:,}" for split in splits)))
    bad_rows = [sum(entry["rows"] for entry in split.bad_rows) for split in splits]
    rows.append(("rows that cannot be used", *(f"{number:,}" for number in bad_rows)))
    rows.append(("files", *(f"{split.files:,}" for split in splits)))
    for label in found.schema.of_kind("label"):
        is_rate = found.schema.columns[label].loss in (None, "bce")
        name, style = ("rate", ".2%") if is_rate else ("mean", ".4g")
        add(f"{name} of label {label}", lambda split: f"{split.numbers[label].mean:{style}}")  # noqa: B023
        if found.schema.columns[label].nullable:
            add(
                f"rows without label {label}",
                lambda split: f"{split.usable_rows - split.numbers[label].count:,}",  # noqa: B023
            )
    add("groups", lambda split: _distinct(split.keys[GROUPS]))
    add("target items", lambda split: f"{len(split.item_counts.items):,}")
    shares = {split.split: found.shares_of_rows(split.split) for split in splits}
    for key, name in SHARES.items():
        if any(key in of_split for of_split in shares.values()):
            add(name, lambda split: _percent(shares[split.split].get(key)))  # noqa: B023
    for column in dict.fromkeys(column for split in splits for column in split.times):
        for name, end in (("from", 0), ("to", 1)):
            add(f"{column} {name}", lambda split: _moment(split, column, end))  # noqa: B023
    return align_columns(rows)


def _distinct(keys: KeyCounts) -> str:
    return f"{keys.distinct:,}" if keys.is_exact else f"about {keys.distinct:,}"


def _moment(split: SplitSummary, column: str, end: int) -> str:
    return in_words(split.times[column][end]) if column in split.times else "-"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _columns(found: DatasetSummary) -> str:
    """Return the tables of lists and dense columns."""
    lists: list[Sequence[str]] = [("lengths of lists", "split", "mean", *QUANTILES, "max", "empty")]
    numbers: list[Sequence[str]] = [("numbers", "split", "min", "mean", "max", "deviation")]
    columns = [name for name, of in found.schema.columns.items() if of.kind != "label"]
    for name, split in product(columns, found.splits.values()):
        if name in split.lists:
            of_list = split.lists[name].summary()
            quantiles = [f"{of_list[q]:,}" for q in (*QUANTILES, "max")]
            mean, empty = f"{of_list['mean']:.1f}", _percent(of_list["empty_share"])
            lists.append((name, split.split, mean, *quantiles, empty))
        elif name in split.numbers:
            of = split.numbers[name].summary()
            figures = ("min", "mean", "max", "deviation")
            cells = [f"{of[key]:.4g}" if of else "-" for key in figures]
            numbers.append((name, split.split, *cells))
    return "\n\n".join(align_columns(rows) for rows in (lists, numbers) if len(rows) > 1)


def _tables(found: DatasetSummary) -> str:
    rows = [("table", "rows", "vocabulary", "ids used", "unused", "ids from", "to")]
    for name, use in found.tables.items():
        of_splits = [split.ids[name] for split in found.splits.values() if name in split.ids]
        least = [ids.least for ids in of_splits if ids.least is not None]
        greatest = [ids.greatest for ids in of_splits if ids.greatest is not None]
        ends = (f"{min(least):,}", f"{max(greatest):,}") if least else ("-", "-")
        if use.vocabulary == "bounded":  # its ids are raw, not rows
            ends = ("-", "-")
        about = "" if use.is_exact else "about "
        cells = (f"{about}{use.ids:,}", _percent(use.unused_share))
        rows.append((name, f"{use.rows:,}", use.vocabulary or "-", *cells, *ends))
    return align_columns(rows)


def _items(found: DatasetSummary) -> str:
    if found.items is None:
        return ""
    items = found.items
    text = f"{items.rows:,} items, {found.items_without_rows():,} of them in no impression"
    rows = [("content", "kind", "items without", "what the others have")]
    for name, column in items.columns.items():
        missing = _percent(column.missing_share(items.rows))
        rows.append((name, column.kind, missing, _content(column)))
    return f"{text}\n{align_columns(rows)}" if len(rows) > 1 else text


def _content(column: ColumnSummary) -> str:
    if column.kind == "image":
        formats = ", ".join(f"{name} {count:,}" for name, count in column.formats.most_common(3))
        sizes = ", ".join(f"{size} ({count:,})" for size, count in column.sizes.most_common(2))
        return f"{formats}; most often {sizes}; of those opened" if formats else "-"
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
