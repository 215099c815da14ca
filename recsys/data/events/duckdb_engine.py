"""DuckDB as an engine, on one machine: stages are Parquet files until the end."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.data.events.reader import Reader
from recsys.data.events.sql import ROWS_PER_BATCH, ROWS_PER_GROUP, BatchFunction, Complete, quoted
from recsys.data.parquet.values import is_list

BYTES_PER_PART = 32 << 20  # of rows before they are completed
VALUES_TO_COMPARE = 1 << 16
REPEATED = 16  # times a value occurs on average, from which on a dictionary of values pays


class DuckDBEngine:
    """DuckDB sorts, joins and spills to disk; functions run in this process.

    The caller removes the folder `work`. By default DuckDB takes 80 % of the memory and all cores.

    Raises:
        ValueError: the disk is full, `memory` is no size, or `threads` is below 1.
    """

    unnest, hash = "unnest", "hash"

    def __init__(self, work: Path, memory: str | None = None, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"--threads is {threads}; set at least 1")
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        self.scratch: Path | None = work / "values"
        self._threads = threads or len(os.sched_getaffinity(0))
        with self._explained():
            self._duckdb = duckdb.connect(
                config={
                    "temp_directory": str(work / "spilled"),
                    "preserve_insertion_order": False,
                    "threads": self._threads,
                }
            )
        if memory is not None:
            try:
                self._duckdb.execute("SET memory_limit = ?", [memory])
            except duckdb.Error as error:
                raise ValueError(f"--memory is {memory}; write a size such as 4GB") from error

    def close(self) -> None:
        self._duckdb.close()

    def add_files(self, name: str, readers: list[Reader]) -> None:
        batches = (
            batch for reader in readers for task in reader.tasks for batch in reader.read(task)
        )
        self._add_batches(name, batches, readers[0].schema)

    def add(self, name: str, query: str) -> None:
        file = self._new_file(name)
        with self._explained():
            self._duckdb.execute(
                f"COPY ({query}) TO '{file}' (FORMAT parquet, COMPRESSION lz4_raw)"
            )
        self.view(name, f"SELECT * FROM read_parquet('{file}')")

    def view(self, name: str, query: str) -> None:
        with self._explained():
            self._duckdb.execute(f"CREATE VIEW {name} AS {query}")

    def add_mapped(
        self, name: str, query: str, by: list[str], order: list[str], function: BatchFunction
    ) -> None:
        ordered = f"SELECT * FROM ({query}) ORDER BY {', '.join(map(quoted, [*by, *order]))}"
        self._add_batches(name, function(self._batches(ordered)), function.schema)

    def table(self, query: str) -> pa.Table:
        with self._explained():
            return self._duckdb.sql(query).to_arrow_table()

    def write(
        self,
        query: str,
        folder: Path,
        rows_per_group: int = ROWS_PER_GROUP,
        complete: Complete | None = None,
    ) -> int:
        batches = self._batches(query, 16 * rows_per_group)
        with self._explained():
            return write_parts(batches, folder, rows_per_group, self._threads, complete)

    def _add_batches(self, name: str, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
        file = self._new_file(name)
        # Read soon, and not searched; by the limits in the statistics DuckDB sorts narrow keys.
        options = {"compression": "lz4", "use_dictionary": False}
        with self._explained(), pq.ParquetWriter(file, schema, **options) as writer:
            for batch in batches:
                writer.write_batch(batch)
        self.view(name, f"SELECT * FROM read_parquet('{file}')")

    def _new_file(self, name: str) -> Path:
        (self.work / name).mkdir()
        return self.work / name / "part-00000.parquet"

    def _batches(self, query: str, rows: int = ROWS_PER_BATCH) -> Iterator[pa.RecordBatch]:
        with self._explained():
            yield from self._duckdb.sql(query).to_arrow_reader(rows)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise DuckDB's errors as ValueErrors; what disk and memory refuse names the folder."""
        try:
            yield
        except (duckdb.IOException, duckdb.OutOfMemoryException, OSError) as error:
            raise ValueError(
                f"{self.work}: cannot go on ({str(error).splitlines()[0]}); free disk space "
                "there, or set --memory to what this machine has"
            ) from error
        except duckdb.Error as error:  # such as values that SQL cannot convert
            raise ValueError(f"DuckDB cannot go on: {str(error).splitlines()[0]}") from error


def write_parts(
    batches: Iterable[pa.RecordBatch],
    folder: Path,
    rows_per_group: int,
    threads: int,
    complete: Complete | None,
) -> int:
    """Write batches in order into a new folder, no file without rows; return the number of rows.

    `complete` makes the rows of a row group, in as many threads as files are written at once.
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
        for future in running:
            future.result()
    return rows


def _parts(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        pending.append(batch)
        if sum(rows.nbytes for rows in pending) >= BYTES_PER_PART:
            yield pa.Table.from_batches(pending)
            pending = []
    if any(rows.num_rows for rows in pending):
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
        for rows in chain([group], groups):
            writer.write_batch(rows, row_group_size=rows_per_group)


def _encodings(rows: pa.RecordBatch) -> dict[str, Any]:
    """Return settings of a writer: numbers that hardly repeat are split into streams of bytes."""
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
    return {"use_dictionary": dictionary, "column_encoding": streams or None}
