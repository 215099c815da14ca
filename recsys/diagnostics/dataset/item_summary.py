"""Summarizes the items' files: number of items, and their content by column.

Texts, features and categories are read from end to end. Missing images are counted from the files'
footers, and a few images are opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from recsys.data.filesystem import Location
from recsys.data.items.category_lists import category_lists
from recsys.data.items.equal_content import share_of_most_common, shared_beginning
from recsys.data.items.feature_file import FeatureFile
from recsys.data.items.images import FORMATS, decode_image
from recsys.data.items.item_features import feature_tokens, usable_features
from recsys.data.items.item_images import check_first_image
from recsys.data.items.item_table import ItemTable, plain_values
from recsys.data.parquet.bad_rows import by_reason
from recsys.data.parquet.file import column_type, open_parquet
from recsys.data.parquet.values import list_lengths
from recsys.data.schema import Schema
from recsys.diagnostics.dataset.numbers import Lengths
from recsys.diagnostics.dataset.time_columns import footer_statistics

IMAGES_OPENED = 256
SAMPLED_ITEMS = 1024  # whose content is compared


@dataclass
class ColumnSummary:
    """One column of content.

    missing: items without content; None if unknown without reading all images.
    lengths: lengths of texts in characters, of features in tokens.
    widths: number of feature vectors by width.
    formats, sizes: number of opened images by format and by size.
    broken: images that could not be opened.
    problem: description of the first content at which training would fail.
    values: number of different categories.
    most_common_share: share of the most frequent content among a sample of the items that have it.
    shared_beginning: number of characters with which most texts of the sample begin alike.
    """

    kind: str
    missing: int | None = 0
    lengths: Lengths = field(default_factory=Lengths)
    widths: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    broken: int = 0
    problem: str = ""
    values: int | None = None
    most_common_share: float = 0.0
    shared_beginning: int = 0

    def missing_share(self, rows: int) -> float | None:
        """Return the share of `rows` items without content; None if unknown."""
        return None if self.missing is None else self.missing / max(rows, 1)


@dataclass
class ItemSummary:
    """Summary of all items.

    ids: int64 [usable items], their rows in the target item's table.
    """

    rows: int
    ids: np.ndarray
    columns: dict[str, ColumnSummary]
    bad_rows: list[dict[str, Any]]


def summarize_items(root: Location, schema: Schema) -> ItemSummary | None:
    """Read and summarize the items; None if the schema has none.

    Raises:
        ValueError: a file or a column cannot be read, as in training.
    """
    if schema.items is None:
        return None
    items = ItemTable(root, schema, on_bad_row="skip")
    columns = {}
    for name, column in schema.items.columns.items():
        if column.file is None:
            columns[name] = _summarize(items, name, column.kind)
        else:
            columns[name] = _summarize_file(root / column.file, items.num_rows)
    _, bad_rows = by_reason(items.bad_rows.found)
    return ItemSummary(items.num_rows, items.ids, columns, bad_rows)


def _summarize_file(file: Location, num_items: int) -> ColumnSummary:
    """Summarize features in a .npy file, which has rows for all or some of the items."""
    features, found = FeatureFile(file), ColumnSummary("feature")
    found.widths[features.width] = features.num_rows
    sample: list[bytes] = []
    for first, values in features.pieces():
        there = ~np.isnan(values).all(axis=2)
        lengths = there.sum(axis=1)
        bad = (there & ~np.isfinite(values).all(axis=2)).any(axis=1)
        if bad.any() and not found.problem:
            found.problem = f"{file}: row {first + bad.argmax()} has a value that is not finite"
        found.lengths.add(lengths[lengths > 0])
        rows = _sampled(first, len(values), features.num_rows)
        sample += [values[row].tobytes() for row in rows if lengths[row]]
    found.most_common_share = share_of_most_common(sample)
    found.missing = max(num_items - found.lengths.count, 0)
    return found


def _summarize(items: ItemTable, name: str, kind: str) -> ColumnSummary:
    found = ColumnSummary(kind)
    if kind == "image":
        _summarize_images(items, name, found)
        return found
    categories: set[Any] = set()
    sample: list[Any] = []
    first_row = 0
    for file, row, chunk in items.chunks(name):
        if kind == "text":
            _add_texts(found, chunk, f"{file}: column '{name}'")
        if kind in ("text", "feature"):
            rows = _sampled(first_row, len(chunk), items.num_rows)
            sample += filter(None, chunk.take(pa.array(rows)).to_pylist())
        first_row += len(chunk)
        if kind == "feature":
            _add_features(found, chunk, f"{file}: column '{name}'", row)
        elif kind == "category":
            lengths, values = category_lists(chunk, f"{file}: column '{name}'")
            is_missing = (lengths == 0) | chunk.is_null().to_numpy(False)
            found.missing = (found.missing or 0) + int(is_missing.sum())
            categories.update(values.drop_null().unique().to_pylist())
        elif kind == "other":
            found.missing = (found.missing or 0) + chunk.null_count
    if kind == "category":
        found.values = len(categories)
    elif kind == "text":
        found.shared_beginning = shared_beginning(sample)
    found.most_common_share = share_of_most_common([repr(content) for content in sample])
    return found


def _sampled(first_row: int, num_rows: int, all_rows: int) -> np.ndarray:
    """Return the rows of a chunk that belong to an evenly spaced sample of the items."""
    sample = np.linspace(0, all_rows - 1, min(all_rows, SAMPLED_ITEMS)).astype(int) - first_row
    return sample[(sample >= 0) & (sample < num_rows)]


def _add_texts(found: ColumnSummary, chunk: pa.Array, where: str) -> None:
    if not (pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type)):
        raise ValueError(f"{where} has type {chunk.type}, expected string")
    try:
        chunk.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{where}: not UTF-8 ({error}); write it in UTF-8") from error
    lengths = pc.fill_null(pc.utf8_length(chunk), 0).to_numpy(zero_copy_only=False)
    found.missing = (found.missing or 0) + int((lengths == 0).sum())
    found.lengths.add(lengths[lengths > 0])


def _add_features(found: ColumnSummary, chunk: pa.Array, where: str, first_row: int) -> None:
    lengths, tokens = feature_tokens(chunk, where)

    def note(bad: np.ndarray, reason: str, message: Callable[[int], str]) -> None:
        if bad.any() and not found.problem:
            row = int(bad.argmax())
            found.problem = f"{where}, row {first_row + row}: {message(row)}"

    found.missing = (found.missing or 0) + int((lengths == 0).sum())
    found.lengths.add(lengths[lengths > 0])
    widths, times = np.unique(list_lengths(tokens), return_counts=True)
    found.widths.update(dict(zip(widths.tolist(), times.tolist())))
    if found.widths:
        usable_features(lengths, tokens, next(iter(found.widths)), note)


def _summarize_images(items: ItemTable, name: str, found: ColumnSummary) -> None:
    per_file = -(-IMAGES_OPENED // len(items.files))
    sample: list[int] = []
    for file in items.files:
        with open_parquet(file, streaming=True) as parquet:
            column_type(parquet, file, name)
            for of_group in footer_statistics(parquet.metadata, name):
                if of_group is None or not of_group.has_null_count:  # such as columns of lists
                    found.missing = None
                elif found.missing is not None:
                    found.missing += of_group.null_count
            batch = next(parquet.iter_batches(per_file, columns=[name]), None)
        if batch is not None:
            chunk, where = plain_values(batch.column(0)), f"{file}: column '{name}'"
            check_first_image([(chunk, where)], decodes=False)
            _open_images(found, chunk, where)
            contents = chunk.drop_null().slice(0, IMAGES_OPENED).to_pylist()
            sample += [hash(tuple(content)) for content in contents if content]
    found.most_common_share = share_of_most_common(sample)


def _open_images(found: ColumnSummary, chunk: pa.Array, where: str) -> None:
    """Decode the first images, as training does."""
    opened = 0
    for row, content in enumerate(chunk.to_pylist()):
        for encoded in content if isinstance(content, list) else [content]:
            if encoded is None or opened == IMAGES_OPENED:
                continue
            opened += 1
            try:
                decode_image(encoded, 1, f"{where}, row {row}")
            except ValueError as error:
                found.broken += 1
                found.problem = found.problem or str(error)
                continue
            with Image.open(BytesIO(encoded), formats=FORMATS) as image:
                found.formats[str(image.format)] += 1
                found.sizes[f"{image.width} x {image.height}"] += 1
