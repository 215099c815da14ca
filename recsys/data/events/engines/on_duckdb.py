"""One machine as an engine: DuckDB, with stages as Parquet files until the end."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.events.engines.base import ROWS_PER_BATCH, ROWS_PER_GROUP, BatchFunction, Complete
from recsys.data.events.engines.parquet_parts import write_parts
from recsys.data.events.files.reader import Reader


class DuckDBEngine:
    """One machine: DuckDB sorts, joins and spills to disk; functions run in this process.

    Args:
        work: folder of the stages; the caller removes it.
        memory: most memory that DuckDB takes, such as 4GB; None: 80 % of the machine's.
        threads: threads of DuckDB, and files written at a time; None: the cores that this process
            may use.

    Raises:
        ValueError: DuckDB cannot go on, such as on a full disk, `memory` is no size, or `threads`
            is below 1.
    """

    unnest, hash = "unnest", "hash"

    def __init__(self, work: Path, memory: str | None = None, threads: int | None = None) -> None:
        """Start an empty database in memory."""
        if threads is not None and threads < 1:
            raise ValueError(f"--threads is {threads}; set at least 1")
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        self.own_files: Path | None = work / "values"
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
        """Release the memory."""
        self._duckdb.close()

    def add_files(self, name: str, readers: list[Reader]) -> None:
        """Read the files of tables with the same columns as a stage."""
        batches = (
            batch for reader in readers for task in reader.tasks for batch in reader.read(task)
        )
        self._add_batches(name, batches, readers[0].schema)

    def add(self, name: str, query: str) -> None:
        """Make a stage of a query's result."""
        file = self._new_file(name)
        with self._explained():
            self._duckdb.execute(
                f"COPY ({query}) TO '{file}' (FORMAT parquet, COMPRESSION lz4_raw)"
            )
        self.view(name, f"SELECT * FROM read_parquet('{file}')")

    def view(self, name: str, query: str) -> None:
        """Name a query, to be run wherever the name is used."""
        with self._explained():
            self._duckdb.execute(f"CREATE VIEW {name} AS {query}")

    def add_mapped(
        self,
        name: str,
        query: str,
        by: list[str],
        order: list[str],
        map_batches: BatchFunction,
        schema: pa.Schema,
    ) -> None:
        """Make a stage of a function over the query's result, sorted by `by` and `order`."""
        ordered = f"SELECT * FROM ({query}) ORDER BY {', '.join([*by, *order])}"
        self._add_batches(name, map_batches(self._batches(ordered)), schema)

    def table(self, query: str) -> pa.Table:
        """Return a small result."""
        with self._explained():
            return self._duckdb.sql(query).to_arrow_table()

    def write(
        self,
        query: str,
        folder: Path,
        rows_per_group: int = ROWS_PER_GROUP,
        complete: Complete | None = None,
    ) -> int:
        """Write a result as Parquet files, in its order; return the number of rows."""
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
        """Yield a result in order, while DuckDB works on the rest."""
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
