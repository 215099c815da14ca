"""Shares of unknown ids, nulls and numbers out of range by column: of training, and of requests.

A package has those of a sample of its training rows; the server counts those of requests beside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job
from recsys.data.parquet.bad_rows import BadRows
from recsys.data.parquet.file import open_parquet, read_row_group
from recsys.data.parquet.rows import ParquetRows
from recsys.data.parquet.values import is_list

FILE = "statistics.json"
MOST_ROWS = 1 << 18  # of the sample, row groups evenly among those of the files, at least one


def write_statistics(job: Job, columns: Sequence[str], folder: Path) -> None:
    """Write shares of `unknown` and `null` and the range of numbers, of a sample of training rows.

    A run with rows of another source than Parquet has none.
    """
    files = (job.root / job.train_folder).files(".parquet")
    statistics: dict[str, dict[str, float]] = {}
    if files and job.config.source.name == "parquet":
        rows = ParquetRows(files, job.schema, with_labels=False)
        rows.bad_rows = BadRows("skip")
        largest = max(chunk.num_rows for chunk in rows.chunks)
        number = min(max(1, MOST_ROWS // largest), len(rows.chunks))
        groups = np.linspace(0, len(rows.chunks) - 1, number).astype(int).tolist()
        usable = pa.concat_tables(rows.read_chunks(groups))
        statistics = dict(_of_columns(job, usable, columns))
        for name, share in _null_shares(rows, groups, job.schema.file_columns(columns)):
            statistics.setdefault(name, {})["null"] = share
    (folder / FILE).write_text(json.dumps(statistics, indent=1) + "\n")


def _of_columns(
    job: Job, rows: pa.Table, columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the share of unknown ids of each column with an exact map, and ranges of numbers."""
    for name in columns:
        values = rows[name].combine_chunks()
        values = values.flatten() if is_list(values.type) else values
        numbers = values.to_numpy(zero_copy_only=False)
        vocabulary = job.schema.vocabularies.get(job.schema.table_of(name))
        if not len(numbers):
            continue
        if job.schema.columns[name].kind == "dense":
            yield name, {"low": float(numbers.min()), "high": float(numbers.max())}
        elif isinstance(vocabulary, ExactVocabulary):
            yield name, {"unknown": float((numbers == vocabulary.unknown_row).mean())}


def _null_shares(
    rows: ParquetRows, groups: Sequence[int], columns: list[str]
) -> Iterator[tuple[str, float]]:
    tables = []
    for number in groups:
        group = rows.row_groups[number]
        with open_parquet(group.file) as parquet:
            tables.append(read_row_group(parquet, group.file, group.index, columns))
    table = pa.concat_tables(tables)
    for name in columns:
        yield name, table[name].null_count / len(table)


def read_statistics(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the statistics of a package by column."""
    return json.loads((folder / FILE).read_text())
