"""Derives findings that a user should act on: a sentence with numbers, and one with the fix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from recsys.data.items.equal_content import is_mostly_equal
from recsys.data.number_ranges import dense_finding
from recsys.data.schema import advice_on_unknown
from recsys.diagnostics.dataset.dataset_summary import SPLITS, DatasetSummary
from recsys.diagnostics.dataset.item_summary import ColumnSummary
from recsys.diagnostics.dataset.split_summary import GROUPS, SplitSummary
from recsys.diagnostics.dataset.time_columns import in_words, seconds

# Shares from which on something is reported.
FEW, MANY, MOST = 0.001, 0.1, 0.5
LONG_BEGINNING = 80  # characters, about 20 tokens


@dataclass(frozen=True)
class Finding:
    """One fact to know before training (`what`), and its fix (`fix`)."""

    what: str
    fix: str


def find(found: DatasetSummary) -> list[Finding]:
    """Return all findings; those that prevent training come first."""
    of_splits = [f for split in found.splits.values() for f in _of_split(found, split)]
    return [
        *_bad_rows(found),
        *_times(found),
        *of_splits,
        *_new_groups(found),
        *_tables(found),
        *_items(found),
    ]


def _bad_rows(found: DatasetSummary) -> Iterator[Finding]:
    of_items = [] if found.items is None else found.items.bad_rows
    fix = "fix the files, or set on_bad_row: skip, which leaves these rows out"
    for name, entries in [
        *((split.split, split.bad_rows) for split in found.splits.values()),
        ("items", of_items),
    ]:
        for entry in entries:
            column = f" column '{entry['column']}'" if entry["column"] else ""
            yield Finding(
                f"{name}: {entry['rows']:,} rows cannot be used, {entry['file']}{column}: "
                f"{entry['reason']} (first: row {entry['first_row']:,}); training ends at it",
                fix,
            )


def _times(found: DatasetSummary) -> Iterator[Finding]:
    for before, after in pairwise(SPLITS):
        for column, (_, last) in found.splits[before].times.items():
            first = found.splits[after].times.get(column, (None, None))[0]
            if first is not None and seconds(first) < seconds(last):
                yield Finding(
                    f"{before} goes on until {in_words(last)} by column '{column}', but {after} "
                    f"begins at {in_words(first)}",
                    "split by time; else training has seen the future of these rows",
                )


def _of_split(found: DatasetSummary, split: SplitSummary) -> Iterator[Finding]:
    if not split.usable_rows:
        return
    shares = found.shares_of_rows(split.split)
    yield from _labels_and_numbers(found, split)
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


def _labels_and_numbers(found: DatasetSummary, split: SplitSummary) -> Iterator[Finding]:
    for label in found.schema.of_kind("label"):
        values = split.numbers[label]
        rate = values.mean
        is_binary = found.schema.columns[label].loss in (None, "bce")
        if values.least >= values.greatest:
            yield Finding(
                f"label '{label}' is {rate:.4g} in all {split.split} rows",
                "a model cannot learn from one value; write rows with other labels, too",
            )
        elif is_binary and min(rate, 1 - rate) < FEW:
            yield Finding(
                f"label '{label}' is 1 in {rate:.4%} of the {split.split} rows",
                "keep only a share of the frequent label's rows, and calibrate predictions",
            )
    for column in found.schema.of_kind("dense") if split.split == "train" else []:
        values = split.numbers[column]
        if finding := dense_finding(column, values.least, values.greatest):
            yield Finding(*finding)


def _new_groups(found: DatasetSummary) -> Iterator[Finding]:
    for split in SPLITS[1:]:
        known = found.shares_of_rows(split).get("of_known_groups")
        group = found.schema.group
        if known is not None and known < MOST:
            groups = found.splits[split].keys[GROUPS].distinct
            yield Finding(
                f"{1 - known:.1%} of the {split} rows have a '{group}' without a training row "
                f"({groups:,} different ones in all)",
                "their vectors are untrained: drop some vectors in training, so that the model "
                f"works without them, embedding.tables.{group}.id_dropout 0.5",
            )


def _tables(found: DatasetSummary) -> Iterator[Finding]:
    for name, use in found.tables.items():
        about = "" if use.is_exact else "about "
        if use.vocabulary is None and use.unused_share > MOST:
            yield Finding(
                f"table '{name}' has {use.rows:,} rows, of which {about}{use.ids:,} are ever used",
                "number the ids without gaps, or give the column a vocabulary",
            )
        if use.vocabulary == "bounded" and use.ids > use.rows:
            yield Finding(
                f"table '{name}' has {use.rows:,} rows for {about}{use.ids:,} ids, so that the "
                "least used ids lose their rows",
                "raise num_embeddings if rare ids matter, else raise admit_after",
            )
    for split in found.splits.values():
        for name, ids in split.ids.items():
            if ids.unknown > MANY * max(ids.count, 1):
                table = found.schema.table_of(name)
                fix = "they share the row of unknown ids; train on rows closer to these"
                if split.split == "train":
                    fix = advice_on_unknown(found.schema, table, found.root)
                    fix = f"fill nulls; for ids that are not rare, {fix}"
                yield Finding(
                    f"{ids.unknown / ids.count:.1%} of the ids in column '{name}' of {split.split} "
                    "are null or unknown to its vocabulary",
                    fix,
                )


def _items(found: DatasetSummary) -> Iterator[Finding]:
    if found.items is None:
        return
    rows = max(found.items.rows, 1)
    for name, column in found.items.columns.items():
        if (missing := column.missing_share(rows)) is not None and missing > MANY:
            yield Finding(
                f"{missing:.1%} of the items have no '{name}'",
                "the model masks them; cover them by another modality",
            )
        if column.broken:
            opened = column.broken + sum(column.formats.values())
            yield Finding(
                f"{column.broken:,} of {opened:,} opened values of '{name}' are no images",
                "write them again as JPEG, PNG or WebP, or null, or set on_bad_row: skip",
            )
        elif column.problem:
            yield Finding(column.problem, "correct it, or set on_bad_row: skip")
        yield from _equal_content(name, column, found.items.rows)
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
