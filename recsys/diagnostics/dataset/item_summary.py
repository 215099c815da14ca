"""Summarize the items' files and content columns, and the times of splits by Parquet footers."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.data.items.images import check_first_image, decode_image
from recsys.data.items.item_table import FeatureFile, ItemTable, plain_values
from recsys.data.items.item_values import (
    category_lists,
    feature_tokens,
    share_of_most_common,
    shared_beginning,
    usable_features,
)
from recsys.data.parquet.bad_rows import by_reason
from recsys.data.parquet.file import column_type, open_parquet
from recsys.data.parquet.rows import ParquetRows
from recsys.data.parquet.values import list_lengths
from recsys.data.schema import Schema
from recsys.storage.location import Location

# Names of integer columns that hold times.
NAMES = ("timestamp", "time", "datetime", "date", "ts", "event_time", "event_timestamp")
# Ranges of integers that, as seconds, ms, us or ns since 1970, are times from 1973 on.
UNITS = ((1e8, 1e10, 1.0), (1e11, 1e13, 1e3), (1e14, 1e16, 1e6), (1e17, 1e19, 1e9))


def time_ranges(rows: ParquetRows, schema: Schema) -> dict[str, tuple[datetime, datetime]]:
    """Return the first and last time of each time column, by name."""
    times: dict[str, list[datetime]] = {}
    for file in {str(group.file): group.file for group in rows.row_groups}.values():
        with open_parquet(file) as parquet:
            for name in (field.name for field in parquet.schema_arrow if _has_times(field, schema)):
                for statistics in footer_statistics(parquet.metadata, name):
                    if statistics is not None and statistics.has_min_max:
                        ends = (_time(statistics.min), _time(statistics.max))
                        times.setdefault(name, []).extend(time for time in ends if time is not None)
    return {name: (min(ends), max(ends)) for name, ends in times.items() if ends}


def _has_times(field: pa.Field, schema: Schema) -> bool:
    if pa.types.is_timestamp(field.type) or pa.types.is_date(field.type):
        return True
    is_named = field.name.lower() in NAMES and field.name not in schema.columns
    return is_named and pa.types.is_integer(field.type)


def footer_statistics(metadata: pq.FileMetaData, name: str) -> Iterator[pq.Statistics | None]:
    """Yield a column's statistics for each row group; None if the footer has none."""
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = map(group.column, range(group.num_columns))
        yield next((c.statistics for c in columns if c.path_in_schema == name), None)


def _time(value: Any) -> datetime | None:
    """Return an integer, date or time as UTC time; None for an integer outside of `UNITS`."""
    if isinstance(value, int):
        units = (unit for lower, upper, unit in UNITS if lower <= value < upper)
        return next((datetime.fromtimestamp(value / unit, UTC) for unit in units), None)
    if not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    return value if value.tzinfo else value.replace(tzinfo=UTC)


QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
LONGEST = 1 << 20  # longer lists and texts count as this length
IMAGES_OPENED = 256
SAMPLED_ITEMS = 1024  # items whose content is compared with each other


@dataclass
class Lengths:
    """A histogram of lengths of lists or texts, with exact quantiles."""

    histogram: np.ndarray = field(default_factory=lambda: np.zeros(1))

    def add(self, lengths: np.ndarray, times: np.ndarray | None = None) -> None:  # int [N] each
        counts = np.bincount(lengths.astype(np.int64).clip(max=LONGEST), times)
        size = max(len(counts), len(self.histogram))
        self.histogram = np.pad(self.histogram, (0, size - len(self.histogram)))
        self.histogram[: len(counts)] += counts

    @property
    def count(self) -> int:
        return int(self.histogram.sum())

    def summary(self) -> dict[str, Any]:
        """Return mean, quantiles, maximum and share of length 0 by name; {} without lengths."""
        if not self.count:
            return {}
        ends = self.histogram.cumsum()
        quantiles = np.searchsorted(ends, np.array(list(QUANTILES.values())) * self.count)
        return {
            "mean": float(np.arange(len(ends)) @ self.histogram / self.count),
            **dict(zip(QUANTILES, quantiles.tolist(), strict=True)),
            "max": int(np.flatnonzero(self.histogram)[-1]),
            "empty_share": float(self.histogram[0] / self.count),
        }


@dataclass
class ColumnSummary:
    """Figures of one content column."""

    kind: str
    missing: int | None = 0  # items without content; None: unknown, as images are not all read
    lengths: Lengths = field(default_factory=Lengths)  # of texts, and of features in tokens
    widths: Counter[int] = field(default_factory=Counter)  # of feature vectors
    opened: int = 0  # images that were decoded as a test
    broken: int = 0  # opened images that cannot be decoded
    problem: str = ""  # the first error that training would raise
    values: int | None = None  # number of different categories
    most_common_share: float = 0.0  # of the most frequent content in a sample
    shared_beginning: int = 0  # length of the prefix that most texts of the sample share

    def add_lengths(self, lengths: np.ndarray) -> None:  # int [N]
        self.missing = (self.missing or 0) + int((lengths == 0).sum())
        self.lengths.add(lengths[lengths > 0])

    def missing_share(self, rows: int) -> float | None:
        """Return the share of `rows` items without content; None if unknown."""
        return None if self.missing is None else self.missing / max(rows, 1)


@dataclass
class ItemSummary:
    """Summary of all items."""

    rows: int
    ids: np.ndarray  # int64 [usable items], rows of the target item's table
    columns: dict[str, ColumnSummary]
    bad_rows: list[dict[str, Any]]


def summarize_items(root: Location, schema: Schema) -> ItemSummary | None:
    """Read and summarize the items; None without items, a ValueError for unreadable items."""
    if schema.items is None:
        return None
    items = ItemTable(root, schema, on_bad_row="skip")
    columns = {
        name: _summarize(items, name, column.kind)
        if column.file is None
        else _summarize_file(root / column.file, items.num_rows)
        for name, column in schema.items.columns.items()
    }
    return ItemSummary(items.num_rows, items.ids, columns, by_reason(items.bad_rows.counts)[1])


def _summarize_file(file: Location, num_items: int) -> ColumnSummary:
    """Summarize features in a .npy file, which may have rows for only some of the items."""
    features, summary = FeatureFile(file), ColumnSummary("feature")
    summary.widths[features.width] = features.num_rows
    sample: list[bytes] = []
    for first, values in features.blocks():
        is_token = ~np.isnan(values).all(axis=2)
        lengths = is_token.sum(axis=1)
        bad = (is_token & ~np.isfinite(values).all(axis=2)).any(axis=1)
        if bad.any() and not summary.problem:
            summary.problem = f"{file}: row {first + bad.argmax()} has a value that is not finite"
        summary.lengths.add(lengths[lengths > 0])
        rows = _sampled(first, len(values), features.num_rows)
        sample += [values[row].tobytes() for row in rows if lengths[row]]
    summary.most_common_share = share_of_most_common(sample)
    summary.missing = max(num_items - summary.lengths.count, 0)
    return summary


def _summarize(items: ItemTable, name: str, kind: str) -> ColumnSummary:
    if kind == "image":
        return _summarize_images(items, name)
    summary, categories = ColumnSummary(kind), set[Any]()
    sample: list[Any] = []
    first_row = 0
    for file, row, chunk in items.chunks(name):
        where = f"{file}: column '{name}'"
        if kind == "text":
            _add_texts(summary, chunk, where)
        elif kind == "feature":
            _add_features(summary, chunk, where, row)
        elif kind == "category":
            lengths, values = category_lists(chunk, where)
            is_missing = (lengths == 0) | chunk.is_null().to_numpy(False)
            summary.missing = (summary.missing or 0) + int(is_missing.sum())
            categories.update(values.drop_null().unique().to_pylist())
        else:
            summary.missing = (summary.missing or 0) + chunk.null_count
        if kind in ("text", "feature"):
            rows = _sampled(first_row, len(chunk), items.num_rows)
            sample += filter(None, chunk.take(pa.array(rows)).to_pylist())
        first_row += len(chunk)
    if kind == "category":
        summary.values = len(categories)
    elif kind == "text":
        summary.shared_beginning = shared_beginning(sample)
    summary.most_common_share = share_of_most_common([repr(content) for content in sample])
    return summary


def _sampled(first_row: int, num_rows: int, all_rows: int) -> np.ndarray:
    """Return the rows of a chunk that belong to an evenly spaced sample of the items."""
    sample = np.linspace(0, all_rows - 1, min(all_rows, SAMPLED_ITEMS)).astype(int) - first_row
    return sample[(sample >= 0) & (sample < num_rows)]


def _add_texts(summary: ColumnSummary, chunk: pa.Array, where: str) -> None:
    if chunk.type not in (pa.string(), pa.large_string()):
        raise ValueError(f"{where} has type {chunk.type}, expected string")
    try:
        chunk.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{where}: not UTF-8 ({error}); write it in UTF-8") from error
    summary.add_lengths(pc.fill_null(pc.utf8_length(chunk), 0).to_numpy(zero_copy_only=False))


def _add_features(summary: ColumnSummary, chunk: pa.Array, where: str, first_row: int) -> None:
    lengths, tokens = feature_tokens(chunk, where)

    def note(bad: np.ndarray, reason: str, message: Callable[[int], str]) -> None:
        if bad.any() and not summary.problem:
            row = int(bad.argmax())
            summary.problem = f"{where}, row {first_row + row}: {message(row)}"

    summary.add_lengths(lengths)
    widths, times = np.unique(list_lengths(tokens), return_counts=True)
    summary.widths.update(dict(zip(widths.tolist(), times.tolist())))
    if summary.widths:
        usable_features(lengths, tokens, next(iter(summary.widths)), note)


def _summarize_images(items: ItemTable, name: str) -> ColumnSummary:
    summary, per_file = ColumnSummary("image"), -(-IMAGES_OPENED // len(items.files))
    sample: list[int] = []
    for file in items.files:
        with open_parquet(file, streaming=True) as parquet:
            column_type(parquet, file, name)
            for statistics in footer_statistics(parquet.metadata, name):
                if statistics is None or not statistics.has_null_count:  # such as columns of lists
                    summary.missing = None
                elif summary.missing is not None:
                    summary.missing += statistics.null_count
            batch = next(parquet.iter_batches(per_file, columns=[name]), None)
        if batch is not None:
            chunk, where = plain_values(batch.column(0)), f"{file}: column '{name}'"
            check_first_image([(chunk, where)], decodes=False)
            _open_images(summary, chunk, where)
            contents = chunk.drop_null().slice(0, IMAGES_OPENED).to_pylist()
            sample += [hash(tuple(content)) for content in contents if content]
    summary.most_common_share = share_of_most_common(sample)
    return summary


def _open_images(summary: ColumnSummary, chunk: pa.Array, where: str) -> None:
    for row, content in enumerate(chunk.to_pylist()):
        for encoded in content if isinstance(content, list) else [content]:
            if encoded is None or summary.opened == IMAGES_OPENED:
                continue
            summary.opened += 1
            try:
                decode_image(encoded, 1, f"{where}, row {row}")
            except ValueError as error:
                summary.broken += 1
                summary.problem = summary.problem or str(error)
