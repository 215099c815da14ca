"""Derives findings that a user should act on: a sentence with numbers, and one with the fix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from recsys.data.items.item_values import is_mostly_equal
from recsys.data.number_ranges import dense_finding
from recsys.data.schema import advice_on_unknown
from recsys.diagnostics.dataset.item_summary import ColumnSummary
from recsys.diagnostics.dataset.summary import GROUPS, SPLITS, DatasetSummary, SplitSummary

# Shares from which on something is reported.
FEW, MANY, MOST = 0.001, 0.1, 0.5
MINUTES = "%Y-%m-%d %H:%M"
LONG_BEGINNING = 80  # characters, about 20 tokens


@dataclass(frozen=True)
class Finding:
    """One fact to know before training (`what`), and its fix (`fix`)."""

    what: str
    fix: str


def find(summary: DatasetSummary) -> list[Finding]:
    """Return all findings; those that prevent training come first."""
    return [
        *_bad_rows(summary),
        *_times(summary),
        *(
            finding
            for split in summary.splits.values()
            for finding in _split_findings(summary, split)
        ),
        *_new_groups(summary),
        *_tables(summary),
        *_items(summary),
    ]


def _bad_rows(summary: DatasetSummary) -> Iterator[Finding]:
    fix = "fix the files, or set on_bad_row: skip, which leaves these rows out"
    for name, entries in [
        *((split.split, split.bad_rows) for split in summary.splits.values()),
        ("items", [] if summary.items is None else summary.items.bad_rows),
    ]:
        for entry in entries:
            column = f" column '{entry['column']}'" if entry["column"] else ""
            yield Finding(
                f"{name}: {entry['rows']:,} rows cannot be used, {entry['file']}{column}: "
                f"{entry['reason']} (first: row {entry['first_row']:,}); training ends at it",
                fix,
            )


def _times(summary: DatasetSummary) -> Iterator[Finding]:
    for before, after in pairwise(SPLITS):
        for column, (_, end) in summary.splits[before].times.items():
            begin = summary.splits[after].times.get(column, (end, end))[0]
            if begin < end:
                yield Finding(
                    f"{before} goes on until {end:{MINUTES}} by column '{column}', but {after} "
                    f"begins at {begin:{MINUTES}}",
                    "split by time; else training has seen the future of these rows",
                )


def _split_findings(summary: DatasetSummary, split: SplitSummary) -> Iterator[Finding]:
    if not split.usable_rows:
        return
    shares = split.shares
    yield from _labels_and_numbers(summary, split)
    if shares["repeated_rows"] > FEW:
        yield Finding(
            f"{shares['repeated_rows']:.1%} of the {split.split} rows are exact repeats of others",
            "remove them, unless each is a separate event",
        )
    if split.split != "train" and shares["in_train"] > FEW:
        yield Finding(
            f"{shares['in_train']:.1%} of the {split.split} rows are exact copies of training rows",
            "remove them from one split; else metrics measure rows that training has seen",
        )
    if shares["target_in_history"] > MANY:
        yield Finding(
            f"{shares['target_in_history']:.1%} of the {split.split} rows have their own target "
            "in their history",
            "remove the row's own event from its history, unless users take an item repeatedly",
        )
    if shares.get("without_item_row", 0.0) > FEW:
        yield Finding(
            f"{shares['without_item_row']:.1%} of the {split.split} rows are of items without a "
            "row in items/",
            "write one row per item; without a row an item has no content",
        )
    if split.split != "train" and shares["unseen"] > MANY:
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
        if not values["count"] or values["min"] >= values["max"]:
            yield Finding(
                f"label '{label}' is {rate:.4g} in all {split.split} rows",
                "a model cannot learn from one value; write rows with other labels, too",
            )
        elif is_binary and min(rate, 1 - rate) < FEW:
            yield Finding(
                f"label '{label}' is 1 in {rate:.4%} of the {split.split} rows",
                "keep only a share of the frequent label's rows, and calibrate predictions",
            )
    for column in summary.schema.of_kind("dense") if split.split == "train" else []:
        values = split.numbers[column]
        if finding := dense_finding(column, values["min"], values["max"]):
            yield Finding(*finding)


def _new_groups(summary: DatasetSummary) -> Iterator[Finding]:
    for split in SPLITS[1:]:
        share = summary.splits[split].shares.get("of_known_groups", 1.0)
        group = summary.schema.group
        if share < MOST:
            groups = summary.splits[split].distinct[GROUPS]
            yield Finding(
                f"{1 - share:.1%} of the {split} rows have a '{group}' without a training row "
                f"({groups:,} different ones in all)",
                "their vectors are untrained: drop some vectors in training, so that the model "
                f"works without them, embedding.tables.{group}.id_dropout 0.5",
            )


def _tables(summary: DatasetSummary) -> Iterator[Finding]:
    for name, use in summary.tables.items():
        if use.vocabulary is None and use.unused_share > MOST:
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
            if share > MANY:
                table = summary.schema.table_of(name)
                fix = "they share the row of unknown ids; train on rows closer to these"
                if split.split == "train":
                    fix = advice_on_unknown(summary.schema, table, summary.root)
                    fix = f"fill nulls; for ids that are not rare, {fix}"
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
        if (missing := column.missing_share(rows)) is not None and missing > MANY:
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
        yield from _equal_content(name, column, summary.items.rows)
        if len(column.widths) > 1:
            yield Finding(
                f"features '{name}' have widths {dict(sorted(column.widths.items()))}",
                "write all of one width",
            )


def _equal_content(name: str, column: ColumnSummary, rows: int) -> Iterator[Finding]:
    if is_mostly_equal(column.most_common_share, rows):
        yield Finding(
            f"{column.most_common_share:.1%} of the sampled items with a '{name}' have the same",
            "write content that differs between items, or use no modality of this column",
        )
    elif column.shared_beginning >= LONG_BEGINNING:
        yield Finding(
            f"most texts of '{name}' begin with the same {column.shared_beginning:,} characters",
            "a text encoder may read only these: remove them, or raise the modality's max_length",
        )
