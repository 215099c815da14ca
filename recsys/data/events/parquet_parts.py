"""Write batches of rows as Parquet files, several files at once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.data.parquet.values import is_list

BYTES_PER_PART = 32 << 20  # of the rows of a file before `Complete` adds columns
VALUES_TO_COMPARE = 1 << 16
REPEATED = 16  # mean occurrences of a value from which dictionary encoding saves space
Batches = Iterable[pa.RecordBatch]
# Adds columns to the rows of a row group and selects the columns to write; None: none are missing.
Complete = Callable[[pa.RecordBatch], pa.RecordBatch] | None


def write_parts(
    batches: Batches, folder: Path, rows_per_group: int, threads: int, complete: Complete
) -> int:
    """Write batches in order into a new folder; return the number of rows. No file is empty."""
    folder.mkdir(parents=True)
    rows = 0
    running: deque[Future[None]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for number, part in enumerate(_parts(batches)):
            if len(running) == threads:  # further parts would only occupy memory
                running.popleft().result()
            path = folder / f"part-{number:05}.parquet"
            running.append(pool.submit(_write_part, part, path, rows_per_group, complete))
            rows += part.num_rows
        for future in running:
            future.result()
    return rows


def slices_by(batches: Batches, column: str) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Yield slices of batches in which a column has one value, each with that value."""
    for batch in batches:
        values = batch.column(column)
        is_new = np.asarray(pc.not_equal(values[1:], values[:-1]))
        bounds = [0, *(np.flatnonzero(is_new) + 1).tolist(), batch.num_rows]
        for first, end in pairwise(bounds):
            if end > first:
                yield values[first].as_py(), batch.slice(first, end - first)


def _parts(batches: Batches) -> Iterator[pa.Table]:
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        pending.append(batch)
        if sum(rows.nbytes for rows in pending) >= BYTES_PER_PART:
            yield pa.Table.from_batches(pending)
            pending = []
    if any(rows.num_rows for rows in pending):
        yield pa.Table.from_batches(pending)


def _write_part(part: pa.Table, path: Path, rows_per_group: int, complete: Complete) -> None:
    groups: Iterator[pa.RecordBatch] = (
        part.slice(first, rows_per_group).combine_chunks().to_batches()[0]
        for first in range(0, part.num_rows, rows_per_group)
    )
    if complete is not None:
        groups = map(complete, groups)
    group = next(groups)
    with pq.ParquetWriter(path, group.schema, **_writer_options(group)) as writer:
        for rows in chain([group], groups):
            writer.write_batch(rows, row_group_size=rows_per_group)


def _writer_options(rows: pa.RecordBatch) -> dict[str, Any]:
    """Return a writer's options: byte stream split for numbers that rarely repeat."""
    dictionary, streams = [], {}
    for name, column in zip(rows.schema.names, rows.columns, strict=True):
        path, values = name, column
        if is_list(column.type):
            path, values = f"{name}.list.element", column.flatten()
        first_values = values.slice(0, VALUES_TO_COMPARE)
        is_number = pa.types.is_int64(values.type) or pa.types.is_float32(values.type)
        if is_number and REPEATED * pc.count_distinct(first_values).as_py() > len(first_values):
            streams[path] = "BYTE_STREAM_SPLIT"
        else:
            dictionary.append(path)
    encodings = {"use_dictionary": dictionary, "column_encoding": streams or None}
    return {"compression": "zstd", "write_page_checksum": True, **encodings}
