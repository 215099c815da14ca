"""Interface of the engines that run the stages of a transformation.

The SQL of the stages is the part that DuckDB and Spark share: joins, GROUP BY, window functions,
names in double quotes. Sorted partitions go through Arrow functions, in this process or in those
of Spark (`mapInArrow`). SQLFrame would run DataFrame code on both, too, but has no `mapInArrow`,
and its planning takes longer than the queries of a small log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from recsys.data.events.files.reader import Reader

ROWS_PER_BATCH = 1 << 17
ROWS_PER_GROUP = 8192  # small enough that several ranks share a split evenly

# Adds columns to rows, and chooses them.
Complete = Callable[[pa.RecordBatch], pa.RecordBatch]
# Maps the batches of a partition, in order, to other batches.
BatchFunction = Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]


class Engine(Protocol):
    """Runs the stages of a transformation. Stages are tables, and SQL refers to them by name.

    unnest: name of the SQL function that makes a row of each value of a list.
    hash: name of the SQL function that hashes several values to 64 bits.
    work: folder of the stages, which all processes of the engine share.
    own_files: folder for files of functions, if all of them run in this process, one after another.
    """

    unnest: str
    hash: str
    work: Path
    own_files: Path | None

    def add_files(self, name: str, readers: list[Reader]) -> None:
        """Read the files of tables with the same columns as a stage."""

    def add(self, name: str, query: str) -> None:
        """Make a stage of a query's result."""

    def view(self, name: str, query: str) -> None:
        """Name a query, to be run wherever the name is used."""

    def add_mapped(
        self,
        name: str,
        query: str,
        by: list[str],
        order: list[str],
        map_batches: BatchFunction,
        schema: pa.Schema,
    ) -> None:
        """Make a stage of a function over the query's result, sorted by `by` and `order`.

        All rows that agree in `by` come to one call, one after another.
        """

    def table(self, query: str) -> pa.Table:
        """Return a small result."""

    def close(self) -> None:
        """Release what the engine holds."""

    def write(
        self,
        query: str,
        folder: Path,
        rows_per_group: int = ROWS_PER_GROUP,
        complete: Complete | None = None,
    ) -> int:
        """Write a result as Parquet files, in its order; return the number of rows.

        Args:
            query: the rows.
            folder: to write.
            rows_per_group: rows of a row group.
            complete: makes the rows that are written, if the engine has `own_files`; may run in
                several threads.
        """
