"""Summarize a dataset for `recsys explain-data`: splits, id tables, items and their overlaps."""

import json
import tempfile
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.data.events.sql import parquet_rows, quoted
from recsys.data.item_frequency import ItemCounts, frequency_masks, target_counts
from recsys.data.parquet.bad_rows import by_reason
from recsys.data.parquet.rows import ParquetRows
from recsys.data.parquet.values import RAW_GROUP, ROW_POSITION
from recsys.data.schema import Schema, load_schema
from recsys.diagnostics.dataset.item_summary import (
    ItemSummary,
    Lengths,
    summarize_items,
    time_ranges,
)
from recsys.storage.location import Location

SPLITS = ("train", "valid", "test")
GROUPS, PAIRS, ROWS = "groups", "group and item", "rows"
NUMBERS = ("label", "dense", "extra", "weight", "sampled")  # kinds of columns
Database = duckdb.DuckDBPyConnection
Statistics = dict[str, Any]
TOP_SHARE = 0.01  # share of the items that count as most frequent


@dataclass
class SplitSummary:
    """Statistics of a split; fields after `bad_rows` cover only rows that training can use."""

    split: str
    rows: int
    files: int
    row_groups: int
    bytes: int
    times: dict[str, tuple[datetime, datetime]]
    bad_rows: list[dict[str, Any]]
    usable_rows: int
    numbers: dict[str, dict[str, Any]]  # by column: count, min, max, mean, deviation, without NaN
    ids: dict[str, dict[str, Any]]  # by column: count, least, greatest, unknown, distinct
    lists: dict[str, Lengths]  # by column
    # Number of distinct groups, (group, item) pairs and rows; the last two only with known items.
    distinct: dict[str, int]
    target_in_history: int  # rows whose history contains their target item
    known_rows: int  # rows whose target item is not an unknown id of an exact vocabulary
    item_counts: ItemCounts  # rows per item, without sampled negatives and rows of weight 0
    shares: dict[str, float]


@dataclass
class TableUse:
    """Number of rows of a table, and of distinct ids that all splits look up in it."""

    rows: int
    ids: int
    vocabulary: str | None

    @property
    def unused_share(self) -> float:
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
        items_fail = self.items is not None and (
            bool(self.items.bad_rows) or any(item.problem for item in self.items.columns.values())
        )
        return items_fail or any(split.bad_rows for split in self.splits.values())

    def items_without_rows(self) -> int:
        """Count the items with content that occur in no impression."""
        assert self.items is not None
        counts = ItemCounts.sum_of([split.item_counts for split in self.splits.values()])
        return int((counts.of(self.items.ids) == 0).sum())


def summarize_dataset(data: str) -> DatasetSummary:
    """Read and summarize a whole dataset, a folder or URL; a ValueError if it is unreadable."""
    root = Location.of(data)
    schema = load_schema(root)
    with tempfile.TemporaryDirectory(prefix="explain-data-") as folder:
        try:
            with duckdb.connect(config={"temp_directory": f"{folder}/spilled"}) as database:
                return _summarize(database, root, schema, Path(folder))
        except duckdb.Error as error:
            raise ValueError(
                f"{folder}: cannot go on ({str(error).splitlines()[0]}); free disk space there, or "
                "set TMPDIR to a folder with more"
            ) from error


def _summarize(database: Database, root: Location, schema: Schema, folder: Path) -> DatasetSummary:
    splits = {name: _summarize_split(database, root, name, schema, folder) for name in SPLITS}
    train, items = splits["train"].item_counts, summarize_items(root, schema)
    for split in splits.values():
        train_counts = target_counts(train, split.item_counts.items, schema)
        is_known = split.item_counts.items != _unknown_item(schema)
        split.shares = _shares(database, split, train_counts, is_known, items)
    return DatasetSummary(root, schema, splits, items, _table_uses(database, schema))


def _summarize_split(
    database: Database, root: Location, split: str, schema: Schema, folder: Path
) -> SplitSummary:
    rows = ParquetRows.of_split(root, split, schema, on_bad_row="skip")
    file = folder / f"{split}.parquet"
    _copy_usable_rows(rows, file)
    has_raw_group = schema.vocabulary_of(schema.group) is not None
    group = _column(RAW_GROUP if has_raw_group else schema.group)
    target = _column(schema.target_item)
    database.execute(
        f'CREATE VIEW {split} AS SELECT *, {group} AS "/group", {target} AS "/item", '
        f'nullif({target}, {_unknown_item(schema)}) AS "/known", '
        'CASE WHEN "/known" IS NOT NULL THEN hash(r) END AS "/row" '
        f"FROM {parquet_rows([file])} r"
    )
    histories = [
        f'list_contains({_column(name)}, "/known")'
        for name in schema.of_kind("sequence")
        if schema.table_of(name) == schema.target_item
    ]
    counts = _row(
        database,
        "SELECT count(*) AS usable_rows, "
        f"count(*) FILTER ({' OR '.join(histories) or 'false'}) AS target_in_history, "
        f'count(DISTINCT "/group") AS {GROUPS}, '
        f'count(DISTINCT CASE WHEN "/known" IS NOT NULL THEN hash("/group", "/item") END) AS '
        f'{quoted(PAIRS)}, count("/known") AS known_rows, '
        f'count(DISTINCT "/row") AS {ROWS} FROM {split}',
    )
    id_columns = [name for name, column in schema.columns.items() if column.kind not in NUMBERS]
    return SplitSummary(
        split=split,
        rows=rows.num_rows,
        files=len({str(row_group.file) for row_group in rows.row_groups}),
        row_groups=len(rows.row_groups),
        bytes=sum(row_group.num_bytes for row_group in rows.row_groups),
        times=time_ranges(rows, schema),
        bad_rows=by_reason(rows.bad_rows.counts)[1],
        usable_rows=counts["usable_rows"],
        numbers=_number_statistics(database, schema, split),
        ids={name: _id_statistics(database, schema, split, name) for name in id_columns},
        lists=_list_lengths(database, schema, split),
        distinct={kind: counts[kind] for kind in (GROUPS, PAIRS, ROWS)},
        target_in_history=counts["target_in_history"],
        known_rows=counts["known_rows"],
        item_counts=_item_counts(database, schema, split),
        shares={},
    )


def _unknown_item(schema: Schema) -> int:
    """Return the row that all unknown target items share, or -1 without such a row."""
    vocabulary = schema.vocabulary_of(schema.target_item)
    is_exact = vocabulary is not None and vocabulary.kind == "exact"
    return schema.limit(schema.target_item) - 1 if is_exact else -1


def _copy_usable_rows(rows: ParquetRows, path: Path) -> None:
    tables = (
        table.filter(pc.greater_equal(table[ROW_POSITION], 0)).drop_columns(ROW_POSITION)
        for table in rows.read(0, rows.num_rows)
    )
    first = next(tables)
    names = [_stored_name(name) for name in first.column_names]
    stored_schema = first.rename_columns(names).schema
    with pq.ParquetWriter(path, stored_schema, compression="lz4") as writer:
        for table in chain([first], tables):
            writer.write_table(table.rename_columns(names))


def _stored_name(name: str) -> str:
    """Return the name of a column in the temporary files: to SQL `Price` and `price` are one."""
    return name.encode().hex()


def _column(name: str) -> str:
    return quoted(_stored_name(name))


def _row(database: Database, query: str) -> dict[str, Any]:
    (row,) = database.sql(query).to_arrow_table().to_pylist()
    return dict(row)


def _number_statistics(database: Database, schema: Schema, split: str) -> dict[str, Statistics]:
    query = (
        "SELECT count(x) AS count, min(x) AS min, max(x) AS max, avg(x) AS mean, stddev_pop(x) AS "
        "deviation FROM (SELECT CAST({} AS DOUBLE) AS x FROM {}) WHERE NOT isnan(x)"
    )
    names = [name for kind in NUMBERS for name in schema.of_kind(kind)]
    return {name: _row(database, query.format(_column(name), split)) for name in names}


def _ids(schema: Schema, split: str, name: str) -> str:
    is_list = schema.columns[name].kind != "id" or schema.rows_per_id(name) > 1
    return f"SELECT {f'unnest({_column(name)})' if is_list else _column(name)} AS id FROM {split}"


def _id_statistics(database: Database, schema: Schema, split: str, name: str) -> Statistics:
    vocabulary = schema.vocabulary_of(name)
    is_exact = vocabulary is not None and vocabulary.kind == "exact"
    is_unknown = f"id = {schema.limit(name) - 1}" if is_exact else "false"
    return _row(
        database,
        "SELECT count(id) AS count, min(id) AS least, max(id) AS greatest, "
        f'count(*) FILTER ({is_unknown}) AS unknown, count(DISTINCT id) AS "distinct" '
        f"FROM ({_ids(schema, split, name)})",
    )


def _list_lengths(database: Database, schema: Schema, split: str) -> dict[str, Lengths]:
    lengths = {name: Lengths() for kind in ("ids", "sequence") for name in schema.of_kind(kind)}
    for name, histogram in lengths.items():
        counts = database.sql(
            f"SELECT coalesce(len({_column(name)}), 0) // {schema.rows_per_id(name)} AS length, "
            f"count(*) AS n FROM {split} GROUP BY 1"
        ).fetchnumpy()
        histogram.add(counts["length"], counts["n"])
    return lengths


def _item_counts(database: Database, schema: Schema, split: str) -> ItemCounts:
    """Return the number of rows of each item, without sampled negatives and rows of weight 0."""
    is_logged = "true" if schema.sampled is None else f"{_column(schema.sampled)} = 0"
    has_weight = "true" if schema.weight is None else f"{_column(schema.weight)} > 0"
    counts = database.sql(
        f'SELECT "/item" AS item, count(*) AS n FROM {split} WHERE {is_logged} AND {has_weight} '
        "GROUP BY 1 ORDER BY 1"
    ).fetchnumpy()
    return ItemCounts(counts["item"].astype(np.int64), counts["n"].astype(np.int64))


def _shares(
    database: Database,
    split: SplitSummary,
    train_counts: np.ndarray,  # [items of the split], as `is_known`
    is_known: np.ndarray,
    items: ItemSummary | None,
) -> dict[str, float]:
    """Return shares of a split's rows by name, the keys of `findings.SHARES`."""
    counts = split.item_counts.counts
    masks = frequency_masks(train_counts)
    logged_rows, rows = max(int(counts.sum()), 1), max(split.usable_rows, 1)
    known_counts = np.sort(counts[is_known])[::-1]
    top_counts = known_counts[: max(1, round(TOP_SHARE * len(known_counts)))]
    shares = {
        **{name: float(counts[masks[name]].sum() / logged_rows) for name in ("cold", "unseen")},
        "repeated_rows": (split.known_rows - split.distinct[ROWS]) / rows,
        "repeated_pairs": (split.known_rows - split.distinct[PAIRS]) / rows,
        "target_in_history": split.target_in_history / rows,
        "of_top_items": float(top_counts.sum() / logged_rows),
    }
    if items is not None:
        without_row = ~np.isin(split.item_counts.items, items.ids)
        shares["without_item_row"] = float(counts[without_row].sum() / logged_rows)
    if split.split != "train" and split.usable_rows:
        for share, column in (("of_known_groups", "/group"), ("in_train", "/row")):
            in_train = f"{quoted(column)} IN (SELECT {quoted(column)} FROM train)"
            query = f"SELECT count(*) AS n FROM {split.split} WHERE {in_train}"
            shares[share] = _row(database, query)["n"] / rows
    return shares


def _table_uses(database: Database, schema: Schema) -> dict[str, TableUse]:
    uses = {}
    for table, column in schema.columns.items():
        if column.num_embeddings is None:
            continue
        ids = [name for kind in ("id", "ids", "sequence") for name in schema.of_kind(kind)]
        names = [name for name in ids if schema.table_of(name) == table]
        rows = " UNION ALL ".join(_ids(schema, split, name) for split in SPLITS for name in names)
        distinct = _row(database, f"SELECT count(DISTINCT id) AS n FROM ({rows})")["n"]
        vocabulary = column.vocabulary.kind if column.vocabulary is not None else None
        uses[table] = TableUse(column.num_embeddings, distinct, vocabulary)
    return uses


def to_json(summary: DatasetSummary, findings: list[Any]) -> str:
    """Return summary and findings as JSON, without arrays and item counts."""
    sections = {"splits": summary.splits, "tables": summary.tables, "items": summary.items}
    content = {"data": str(summary.root), **sections, "findings": findings}
    return json.dumps(content, default=_plain, indent=2) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Lengths):
        return value.summary()
    if isinstance(value, datetime):
        return str(value)
    hidden = (ItemCounts, np.ndarray)
    return {name: field for name, field in vars(value).items() if not isinstance(field, hidden)}
