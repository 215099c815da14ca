"""Writes rows in their order as Parquet files, several at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.data.events.engines.base import Complete
from recsys.data.parquet.values import is_list

BYTES_PER_PART = 32 << 20  # of rows before they are completed
VALUES_TO_COMPARE = 1 << 16
REPEATED = 16  # times a value occurs on average, from which on a dictionary of values pays


def write_parts(
    batches: Iterable[pa.RecordBatch],
    folder: Path,
    rows_per_group: int,
    threads: int,
    complete: Complete | None,
) -> int:
    """Write batches into a new folder and return the number of rows; no file if there is none.

    The names of the files, `part-00000.parquet` and so on, have the order of the rows. `complete`
    gets a row group at a time and makes its rows, in as many threads as files are written at once.
    """
    folder.mkdir(parents=True)
    rows = 0
    running: deque[Future[None]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for number, part in enumerate(_parts(batches)):
            if len(running) == threads:  # more would only wait in memory
                running.popleft().result()
            path = folder / f"part-{number:05}.parquet"
            running.append(pool.submit(_write_part, part, path, rows_per_group, complete))
            rows += part.num_rows
        for one in running:
            one.result()
    return rows


def _parts(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Yield tables of some megabytes."""
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        pending.append(batch)
        if sum(each.nbytes for each in pending) >= BYTES_PER_PART:
            yield pa.Table.from_batches(pending)
            pending = []
    if any(each.num_rows for each in pending):
        yield pa.Table.from_batches(pending)


def _write_part(part: pa.Table, path: Path, rows_per_group: int, complete: Complete | None) -> None:
    groups: Iterator[pa.RecordBatch] = (
        part.slice(first, rows_per_group).combine_chunks().to_batches()[0]
        for first in range(0, part.num_rows, rows_per_group)
    )
    if complete is not None:
        groups = map(complete, groups)
    group = next(groups)
    with pq.ParquetWriter(
        path, group.schema, compression="zstd", write_page_checksum=True, **_encodings(group)
    ) as writer:
        writer.write_batch(group, row_group_size=rows_per_group)
        for group in groups:
            writer.write_batch(group, row_group_size=rows_per_group)


def _encodings(rows: pa.RecordBatch) -> dict[str, Any]:
    """Return settings of a writer: numbers that hardly repeat are split into streams of bytes.

    That takes half the time of a dictionary of such values, and less space.
    """
    dictionary, streams = [], {}
    for name, column in zip(rows.schema.names, rows.columns, strict=True):
        path, values = name, column
        if is_list(column.type):
            path, values = f"{name}.list.element", column.flatten()
        some = values.slice(0, VALUES_TO_COMPARE)
        is_number = pa.types.is_int64(values.type) or pa.types.is_float32(values.type)
        if is_number and REPEATED * pc.count_distinct(some).as_py() > len(some):
            streams[path] = "BYTE_STREAM_SPLIT"
        else:
            dictionary.append(path)
    return {"use_dictionary": dictionary, "column_encoding": streams or None}
