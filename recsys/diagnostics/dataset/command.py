"""Runs `recsys explain-data DATA [--on_bad_row skip] [--json FILE]`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from recsys.data.filesystem import Location, write_whole
from recsys.data.item_frequency import count_items
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.bad_rows import OnBadRow, no_row_left
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.diagnostics.dataset.dataset_summary import (
    SPLITS,
    DatasetSummary,
    summarize_dataset,
    to_json,
)
from recsys.diagnostics.dataset.findings import find
from recsys.diagnostics.dataset.report import format_dataset
from recsys.distributed.log import print_table
from recsys.storage.output_file import check_output

logger = logging.getLogger(__name__)


def explain_data(
    data: str, on_bad_row: OnBadRow = "error", json_file: Path | None = None
) -> DatasetSummary:
    """Read a dataset, print its summary, and write the numbers to `json_file`.

    Raises:
        ValueError: the dataset cannot be read, or `json_file` cannot be written; or, after the
            summary is printed, there is a row at which training would fail, with its message, or,
            if `on_bad_row` is skip, a split without a row that can be used.
    """
    if json_file is not None:
        check_output(json_file)
    found = summarize_dataset(data)
    findings = find(found)
    print_table(format_dataset(found, findings))
    if json_file is not None:
        write_whole(json_file, json.dumps(to_json(found, findings), indent=2) + "\n")
        logger.info("written to %s", json_file)
    if found.has_bad_rows and on_bad_row == "error":
        _raise_first(data, found)
    for split in found.splits.values():
        if not split.usable_rows:
            raise no_row_left(split.rows, split.split, split.bad_rows)
    return found


def _raise_first(data: str, found: DatasetSummary) -> None:
    """Raise the error that training would raise, reading in the same order."""
    root = Location.of(data)
    schema = load_schema(root)
    if schema.items is not None:
        ItemTable(root, schema)
        for column in found.items.columns.values() if found.items is not None else ():
            if column.problem:
                raise ValueError(column.problem)
    for split in SPLITS:
        count_items(ParquetRows.of_split(root, split, schema), 0, 1)
