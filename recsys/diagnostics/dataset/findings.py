"""Run `recsys explain-data DATA [--on-bad-row skip] [--json FILE]`: tables, and findings last."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

from embeddings.plan_text import align_columns
from recsys.data.item_frequency import count_items, dense_finding
from recsys.data.items.item_table import ItemTable
from recsys.data.items.item_values import is_mostly_equal
from recsys.data.parquet.bad_rows import OnBadRow, no_row_left
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import advice_on_unknown, load_schema
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
from recsys.storage.files import atomic_write
from recsys.storage.output_file import check_output

logger = logging.getLogger(__name__)

# A share above one of these thresholds is reported.
SMALL_SHARE, LARGE_SHARE, HALF = 0.001, 0.1, 0.5
MINUTES = "%Y-%m-%d %H:%M"
LONG_BEGINNING = 80  # characters, about 20 tokens


@dataclass(frozen=True)
class Finding:
    """A problem to act on before training, with numbers, and its fix."""

    what: str
    fix: str


def find(summary: DatasetSummary) -> list[Finding]:
    """Return all findings; those that prevent training come first."""
    splits = [_split_findings(summary, split) for split in summary.splits.values()]
    groups = (_bad_rows(summary), _times(summary), *splits, _new_groups(summary), _tables(summary))
    return list(chain(*groups, _items(summary)))


def _bad_rows(summary: DatasetSummary) -> Iterator[Finding]:
    fix = "fix the files, or set on_bad_row: skip, which leaves these rows out"
    entries = {name: split.bad_rows for name, split in summary.splits.items()}
    entries["items"] = [] if summary.items is None else summary.items.bad_rows
    for name, entry in ((name, entry) for name, rows in entries.items() for entry in rows):
        column = f" column '{entry['column']}'" if entry["column"] else ""
        yield Finding(
            f"{name}: {entry['rows']:,} rows cannot be used, {entry['file']}{column}: "
            f"{entry['reason']} (first: row {entry['first_row']:,}); training ends at it",
            fix,
        )


def _times(summary: DatasetSummary) -> Iterator[Finding]:
    for first, second in pairwise(SPLITS):
        for column, (_, end) in summary.splits[first].times.items():
            begin = summary.splits[second].times.get(column, (end, end))[0]
            if begin < end:
                yield Finding(
                    f"{first} goes on until {end:{MINUTES}} by column '{column}', but {second} "
                    f"begins at {begin:{MINUTES}}",
                    "split by time; else training has seen the future of these rows",
                )


def _split_findings(summary: DatasetSummary, split: SplitSummary) -> Iterator[Finding]:
    if not split.usable_rows:
        return
    shares = split.shares
    yield from _labels_and_numbers(summary, split)
    if shares["repeated_rows"] > SMALL_SHARE:
        yield Finding(
            f"{shares['repeated_rows']:.1%} of the {split.split} rows are exact repeats of others",
            "remove them, unless each is a separate event",
        )
    if split.split != "train" and shares["in_train"] > SMALL_SHARE:
        yield Finding(
            f"{shares['in_train']:.1%} of the {split.split} rows are exact copies of training rows",
            "remove them from one split; else metrics measure rows that training has seen",
        )
    if shares["target_in_history"] > LARGE_SHARE:
        yield Finding(
            f"{shares['target_in_history']:.1%} of the {split.split} rows have their own target "
            "in their history",
            "remove the row's own event from its history, unless users take an item repeatedly",
        )
    if shares.get("without_item_row", 0.0) > SMALL_SHARE:
        yield Finding(
            f"{shares['without_item_row']:.1%} of the {split.split} rows are of items without a "
            "row in items/",
            "write one row per item; without a row an item has no content",
        )
    if split.split != "train" and shares["unseen"] > LARGE_SHARE:
        yield Finding(
            f"{shares['unseen']:.1%} of the {split.split} rows are of items that no training row "
            f"has, {shares['cold']:.1%} of items with fewer than five",
            "their id vectors are untrained: train with content, and look at GAUC of unseen items",
        )


def _labels_and_numbers(summary: DatasetSummary, split: SplitSummary) -> Iterator[Finding]:
    for label in summary.schema.of_kind("label"):
        values = split.numbers[label]
        rate = values["mean"]
        is_binary = summary.schema.columns[label].loss in (None, "bce")
        if not values["count"]:
            yield Finding(
                f"label '{label}' is null in all {split.split} rows",
                "write rows that have it, or leave the label out",
            )
        elif values["min"] >= values["max"]:
            yield Finding(
                f"label '{label}' is {rate:.4g} in all {split.split} rows",
                "a model cannot learn from one value; write rows with other labels, too",
            )
        elif is_binary and min(rate, 1 - rate) < SMALL_SHARE:
            yield Finding(
                f"label '{label}' is 1 in {rate:.4%} of the {split.split} rows",
                "keep only a share of the frequent label's rows, and calibrate predictions",
            )
    for column in summary.schema.of_kind("dense") if split.split == "train" else []:
        values = split.numbers[column]
        if finding := dense_finding(column, values["min"], values["max"]):
            yield Finding(*finding)


def _new_groups(summary: DatasetSummary) -> Iterator[Finding]:
    group = summary.schema.group
    for name, split in summary.splits.items():
        share = split.shares.get("of_known_groups", 1.0)
        if share < HALF:
            yield Finding(
                f"{1 - share:.1%} of the {name} rows have a '{group}' without a training row "
                f"({split.distinct[GROUPS]:,} different ones in all)",
                "their vectors are untrained: drop some vectors in training, so that the model "
                f"works without them, embedding.tables.{group}.id_dropout 0.5",
            )


def _tables(summary: DatasetSummary) -> Iterator[Finding]:
    for name, use in summary.tables.items():
        if use.vocabulary is None and use.unused_share > HALF:
            yield Finding(
                f"table '{name}' has {use.rows:,} rows, of which {use.ids:,} are ever used",
                "number the ids without gaps, or give the column a vocabulary",
            )
        if use.vocabulary == "bounded" and use.ids > use.rows:
            yield Finding(
                f"table '{name}' has {use.rows:,} rows for {use.ids:,} ids, so that the "
                "least used ids lose their rows",
                "raise num_embeddings if rare ids matter, else raise admit_after",
            )
    for split in summary.splits.values():
        for name, ids in split.ids.items():
            share = ids["unknown"] / max(ids["count"], 1)
            if share > LARGE_SHARE:
                fix = "they share the row of unknown ids; train on rows closer to these"
                if split.split == "train":
                    table = summary.schema.table_of(name)
                    advice = advice_on_unknown(summary.schema, table, summary.root)
                    fix = f"fill nulls; for ids that are not rare, {advice}"
                yield Finding(
                    f"{share:.1%} of the ids in column '{name}' of {split.split} "
                    "are null or unknown to its vocabulary",
                    fix,
                )


def _items(summary: DatasetSummary) -> Iterator[Finding]:
    if summary.items is None:
        return
    rows = max(summary.items.rows, 1)
    for name, column in summary.items.columns.items():
        if (missing := column.missing_share(rows)) is not None and missing > LARGE_SHARE:
            yield Finding(
                f"{missing:.1%} of the items have no '{name}'",
                "the model masks them; cover them by another modality",
            )
        if column.broken:
            yield Finding(
                f"{column.broken:,} of {column.opened:,} opened values of '{name}' are no images",
                "write them again as JPEG, PNG or WebP, or null, or set on_bad_row: skip",
            )
        elif column.problem:
            yield Finding(column.problem, "correct it, or set on_bad_row: skip")
        if is_mostly_equal(column.most_common_share, summary.items.rows):
            yield Finding(
                f"{column.most_common_share:.1%} of the sampled items with a '{name}' have the "
                "same",
                "write content that differs between items, or use no modality of this column",
            )
        elif column.shared_beginning >= LONG_BEGINNING:
            yield Finding(
                f"most texts of '{name}' begin with the same {column.shared_beginning:,} "
                "characters",
                "a text encoder may read only these: remove them, or raise the modality's "
                "max_length",
            )
        if len(column.widths) > 1:
            yield Finding(
                f"features '{name}' have widths {dict(sorted(column.widths.items()))}",
                "write all of one width",
            )


def explain_data(
    data: str, on_bad_row: OnBadRow = "error", json_file: Path | None = None
) -> DatasetSummary:
    """Read a dataset, print and return its summary, and write the numbers to `json_file`.

    Data that training would refuse is a ValueError; with `on_bad_row` skip, bad rows are not.
    """
    if json_file is not None:
        check_output(json_file)
    summary = summarize_dataset(data)
    findings = find(summary)
    print_table(format_dataset(summary, findings))
    if json_file is not None:
        atomic_write(json_file, to_json(summary, findings))
        logger.info("written to %s", json_file)
    if summary.has_bad_rows and on_bad_row == "error":
        _raise_first(summary)
    for split in summary.splits.values():
        if not split.usable_rows:
            raise no_row_left(split.rows, split.split, split.bad_rows)
    return summary


def _raise_first(summary: DatasetSummary) -> None:
    """Raise the error that training would raise first, by reading in the same order."""
    schema = load_schema(summary.root)
    if summary.items is not None:
        ItemTable(summary.root, schema)
        for column in summary.items.columns.values():
            if column.problem:
                raise ValueError(column.problem)
    for split in SPLITS:
        count_items(ParquetRows.of_split(summary.root, split, schema), 0, 1)


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
    tables = (_splits, _columns, _table_text, _item_text)
    lines = [f"warning: {finding.what}; fix: {finding.fix}" for finding in findings]
    warnings = "\n".join(lines or ["no warnings"])
    blocks = [str(summary.root), *(table(summary) for table in tables), warnings]
    return "\n\n".join(block for block in blocks if block)


def _splits(summary: DatasetSummary) -> str:
    splits = list(summary.splits.values())
    bad_rows = [sum(entry["rows"] for entry in split.bad_rows) for split in splits]
    rows: list[Sequence[str]] = [
        ("", *summary.splits),
        ("rows", *(f"{split.rows:,}" for split in splits)),
        ("rows that cannot be used", *(f"{number:,}" for number in bad_rows)),
        ("files", *(f"{split.files:,}" for split in splits)),
    ]

    def add(name: str, value: Callable[[SplitSummary], str]) -> None:
        rows.append((name, *(value(split) if split.usable_rows else "-" for split in splits)))

    for label in summary.schema.of_kind("label"):
        is_rate = summary.schema.columns[label].loss in (None, "bce")
        name, style = ("rate", ".2%") if is_rate else ("mean", ".4g")
        add(f"{name} of label {label}", lambda split: _number(split.numbers[label]["mean"], style))  # noqa: B023
        if summary.schema.columns[label].nullable:
            add(
                f"rows without label {label}",
                lambda split: f"{split.usable_rows - split.numbers[label]['count']:,}",  # noqa: B023
            )
    add("groups", lambda split: f"{split.distinct[GROUPS]:,}")
    add("target items", lambda split: f"{len(split.item_counts.items):,}")
    for key, name in SHARES.items():
        if any(key in split.shares for split in splits):
            add(name, lambda split: _number(split.shares.get(key), ".1%"))  # noqa: B023
    for column in dict.fromkeys(column for split in splits for column in split.times):
        for name, end in (("from", 0), ("to", 1)):
            times = [split.times.get(column) for split in splits]
            cells = ["-" if ends is None else f"{ends[end]:{MINUTES}}" for ends in times]
            rows.append((f"{column} {name}", *cells))
    return align_columns(rows)


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else f"{value:{style}}"


def _columns(summary: DatasetSummary) -> str:
    lists: list[Sequence[str]] = [("lengths of lists", "split", "mean", *QUANTILES, "max", "empty")]
    numbers: list[Sequence[str]] = [("numbers", "split", "min", "mean", "max", "deviation")]
    columns = [name for name, column in summary.schema.columns.items() if column.kind != "label"]
    for name, split in product(columns, summary.splits.values()):
        if name in split.lists and (lengths := split.lists[name].summary()):
            quantiles = [f"{lengths[key]:,}" for key in (*QUANTILES, "max")]
            mean, empty = f"{lengths['mean']:.1f}", f"{lengths['empty_share']:.1%}"
            lists.append((name, split.split, mean, *quantiles, empty))
        elif name in split.numbers:
            values = [split.numbers[name][key] for key in numbers[0][2:]]
            cells = [_number(value, ".4g") for value in values]
            numbers.append((name, split.split, *cells))
    return "\n\n".join(align_columns(rows) for rows in (lists, numbers) if len(rows) > 1)


def _table_text(summary: DatasetSummary) -> str:
    rows = [("table", "rows", "vocabulary", "ids used", "unused", "ids from", "to")]
    for name, use in summary.tables.items():
        ids = [split.ids[name] for split in summary.splits.values() if name in split.ids]
        limits = [column[end] for column in ids for end in ("least", "greatest") if column["count"]]
        ends = ("-", "-")
        if limits and use.vocabulary != "bounded":  # its columns hold raw ids, not rows
            ends = (f"{min(limits):,}", f"{max(limits):,}")
        cells = (f"{use.ids:,}", f"{use.unused_share:.1%}")
        rows.append((name, f"{use.rows:,}", use.vocabulary or "-", *cells, *ends))
    return align_columns(rows)


def _item_text(summary: DatasetSummary) -> str:
    if summary.items is None:
        return ""
    items = summary.items
    text = f"{items.rows:,} items, {summary.items_without_rows():,} of them in no impression"
    rows = [("content", "kind", "items without", "what the others have")]
    for name, column in items.columns.items():
        missing = _number(column.missing_share(items.rows), ".1%")
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
