"""Interface of the engines that run the stages of a transformation, and parts of their SQL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

if TYPE_CHECKING:
    from recsys.data.events.reader import Reader

FOREVER = 2**62  # later than any time
ROWS_PER_BATCH = 1 << 17
ROWS_PER_GROUP = 8192  # small enough that several ranks share a split evenly

# Adds columns to rows, and chooses them.
Complete = Callable[[pa.RecordBatch], pa.RecordBatch]


class BatchFunction(Protocol):
    """Maps the batches of a partition, in order, to others of a schema."""

    @property
    def schema(self) -> pa.Schema:
        """Columns of the result."""

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the result of sorted batches."""


class SqlEngine(Protocol):
    """Runs the stages of a transformation. Stages are tables, and SQL refers to them by name.

    unnest, hash: names of SQL functions: one row per value of a list; several values to 64 bits.
    work: folder of the stages, which all processes of the engine share.
    scratch: folder for files that functions write, if they run in this process; else None.
    """

    unnest: str
    hash: str
    work: Path
    scratch: Path | None

    def add_files(self, name: str, readers: list[Reader]) -> None:
        """Read the files of tables with the same columns as a stage."""

    def add(self, name: str, query: str) -> None:
        """Make a stage of a query's result."""

    def view(self, name: str, query: str) -> None:
        """Name a query, to be run wherever the name is used."""

    def add_mapped(
        self, name: str, query: str, by: list[str], order: list[str], function: BatchFunction
    ) -> None:
        """Make a stage of a function over a sorted result; rows that agree in `by` share a call."""

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
        """Write rows, made by `complete`, as Parquet in their order; return their number."""


def quoted(name: str) -> str:
    """Return a name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return a text as SQL writes it; engines differ in how they escape quotes."""
    if "'" in text or "\\" in text:
        raise ValueError(f"action {text!r}: quotes and backslashes cannot be in it; rename it")
    return f"'{text}'"


def filled(column: str, fill: float | int | str | None, name: str) -> str:
    """Return SQL of a column with its nulls filled, under a name."""
    if fill is not None:
        column = f"coalesce({column}, {literal(fill) if isinstance(fill, str) else fill})"
    return f"{column} AS {quoted(name)}"


def one_value(engine: SqlEngine, value: str, source: str) -> int:
    """Return an aggregate of a stage, or of those rows that a WHERE after its name selects."""
    return engine.table(f"SELECT {value} AS x FROM {source}")["x"][0].as_py()  # type: ignore[no-any-return]


def count_rows(engine: SqlEngine, source: str) -> int:
    """Return the number of rows of a stage, or of those that a WHERE after its name selects."""
    return one_value(engine, "count(*)", source)


def count_by_reason(engine: SqlEngine, cases: dict[str, str], source: str) -> dict[str, int]:
    """Count the rows of a stage by the first condition in `cases` that they meet, "" for none."""
    numbered = " ".join(
        f"WHEN {condition} THEN {number}" for number, condition in enumerate(cases.values())
    )
    table = engine.table(
        f"SELECT CASE {numbered} ELSE {len(cases)} END AS r, count(*) AS n FROM {source} "
        "GROUP BY 1 ORDER BY 1"
    )
    reasons = [*cases, ""]
    counts = zip(table["r"].to_pylist(), table["n"].to_pylist(), strict=True)
    return {reasons[number]: count for number, count in counts}
