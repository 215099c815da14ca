"""SQL engines that run the stages of a transformation, and parts of their SQL.

DuckDB runs on one machine; its stages are Parquet files until the end. Spark runs locally or on a
cluster, whose executors share its folders and have this package.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.events.parquet_parts import Complete, slices_by, write_parts
from recsys.extras import missing_extra

if TYPE_CHECKING:
    from recsys.data.events.reader import Reader

FOREVER = 2**62  # later than any time
ROWS_PER_BATCH = 1 << 17
ROWS_PER_GROUP = 8192  # small enough that several ranks share a split evenly
AT_START = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false"}
SETTINGS = {
    "spark.sql.ansi.enabled": "true",
    "spark.sql.ansi.doubleQuotedIdentifiers": "true",
    "spark.sql.execution.arrow.maxRecordsPerBatch": str(ROWS_PER_BATCH),
}

# Maps the sorted batches of a partition, in order, to others.
BatchFunction = Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]


class DuckDBEngine:
    """Runs stages, which are tables: DuckDB sorts, joins and spills; functions run in this process.

    The caller removes the folder `work`. By default DuckDB takes 80 % of the memory and all cores.

    unnest, hash: names of SQL functions: one row per value of a list; several values to 64 bits.
    work: folder of the stages, which all processes of the engine share.
    scratch: folder for files that functions write, if they run in this process; else None.

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

    def save(self, query: str, file: Path, by: str | None = None) -> list[Path]:
        """Write a query's result as Parquet: `file`, or `BY=VALUE/NAME-*` beside it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        target, options = file, "FORMAT parquet, COMPRESSION lz4_raw"  # read in each call
        if by is not None:
            target, options = file.parent, "FORMAT parquet, COMPRESSION zstd"
            options += f", PARTITION_BY ({by}), FILENAME_PATTERN '{file.stem}-{{i}}'"
            options += ", OVERWRITE_OR_IGNORE"
        with self._explained():
            self._duckdb.execute(f"COPY ({query}) TO '{target}' ({options})")
        return [file] if by is None else sorted(target.glob(f"*/{file.stem}-*"))

    def read_saved(self, name: str, files: Sequence[Path]) -> None:
        """Name the rows of files that `save` has written."""
        self.view(name, f"SELECT * FROM read_parquet({[str(file) for file in files]})")

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
        function: BatchFunction,
        schema: pa.Schema,
    ) -> None:
        """Make a stage of a function over a sorted result; rows that agree in `by` share a call."""
        ordered = f"SELECT * FROM ({query}) ORDER BY {', '.join(map(quoted, [*by, *order]))}"
        self._add_batches(name, function(self._batches(ordered)), schema)

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
        """Write rows, made by `complete`, as Parquet in their order; return their number."""
        batches = self._batches(query, 16 * rows_per_group)
        with self._explained():
            return write_parts(batches, folder, rows_per_group, self._threads, complete)

    def write_by(self, query: str, column: str, folder: Path, complete: Complete | None) -> None:
        """Write rows, ordered by a column, into a folder for each value of it."""
        for value, parts in groupby(slices_by(self._batches(query), column), itemgetter(0)):
            batches = (batch for _, batch in parts)
            with self._explained():
                write_parts(batches, folder / value, ROWS_PER_GROUP, self._threads, complete)

    @staticmethod
    def least_of_last(column: str, number: int, condition: str) -> str:
        """Return SQL of the least of the largest values of a column by a condition."""
        return f"list_min(max({column}, {number}) FILTER (WHERE {condition}))"

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


class SparkEngine:
    """A Spark session in the running application, or a new one at `master`; as `DuckDBEngine`."""

    unnest, hash = "explode", "xxhash64"
    scratch: Path | None = None  # functions run in executors

    def __init__(self, work: Path, master: str) -> None:
        try:
            from pyspark.sql import SparkSession
        except ImportError as error:
            raise missing_extra("spark", "--engine spark, with Java 17,", error) from error
        active = SparkSession.getActiveSession()
        session: Any = active or _start(SparkSession.builder, master)
        self._started = session if active is None else None
        self._spark = session.newSession()
        for name, value in SETTINGS.items():
            self._spark.conf.set(name, value)
        if self._spark.sparkContext.master.startswith("local"):
            # As many tasks as a cluster has would spend their time in starting.
            tasks = self._spark.sparkContext.defaultParallelism
            self._spark.conf.set("spark.sql.shuffle.partitions", tasks)
        self.work = work

    def close(self) -> None:
        if self._started is not None:
            self._started.stop()

    def add_files(self, name: str, readers: list[Reader]) -> None:
        tasks = [
            (number, place)
            for number, reader in enumerate(readers)
            for place in range(len(reader.tasks))
        ]

        def read(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                for row in batch.to_pylist():
                    reader = readers[row["reader"]]
                    yield from reader.read(reader.tasks[row["task"]])

        parts = min(len(tasks), 10 * self._spark.sparkContext.defaultParallelism)
        frame = self._spark.createDataFrame(tasks, "reader int, task int").repartition(parts)
        self._save(name, frame.mapInArrow(read, _spark_schema(readers[0].schema)))

    def add(self, name: str, query: str) -> None:
        self._save(name, self._spark.sql(query))

    def view(self, name: str, query: str) -> None:
        self._spark.sql(query).createOrReplaceTempView(name)

    def add_mapped(
        self,
        name: str,
        query: str,
        by: list[str],
        order: list[str],
        function: BatchFunction,
        schema: pa.Schema,
    ) -> None:
        frame = self._spark.sql(query).repartition(*by).sortWithinPartitions(*by, *order)
        self._save(name, frame.mapInArrow(function, _spark_schema(schema)))

    def table(self, query: str) -> pa.Table:
        with _spark_explained():
            return self._spark.sql(query).toArrow()

    def write(
        self,
        query: str,
        folder: Path,
        rows_per_group: int = ROWS_PER_GROUP,
        complete: Complete | None = None,
    ) -> int:
        assert complete is None, "without scratch"
        return self._write(self._spark.sql(query), folder, rows_per_group)

    def write_by(self, query: str, column: str, folder: Path, complete: Complete | None) -> None:
        assert complete is None, "without scratch"
        frame = self._spark.sql(query)
        values = self.table(f"SELECT DISTINCT {quoted(column)} AS value FROM ({query})")["value"]
        for value in values.to_pylist():
            rows = frame.where(f"{quoted(column)} = '{value}'").drop(column)
            self._write(rows, folder / value, ROWS_PER_GROUP)

    def save(self, query: str, file: Path, by: str | None = None) -> list[Path]:
        parts, files = self.work / "saved" / file.parent.name, list[Path]()
        with _spark_explained():
            writer = self._spark.sql(query).write.option("compression", "zstd")
            (writer if by is None else writer.partitionBy(by)).parquet(f"file://{parts}")
        for number, part in enumerate(sorted(parts.rglob("*.parquet"))):
            folder = file.parent / part.parent.relative_to(parts)
            folder.mkdir(parents=True, exist_ok=True)
            files.append(folder / f"{file.stem}-{number}.parquet")
            shutil.move(part, files[-1])
        return files

    def read_saved(self, name: str, files: Sequence[Path]) -> None:
        with _spark_explained():
            urls = [f"file://{file}" for file in files]
            self._spark.read.parquet(*urls).createOrReplaceTempView(name)

    @staticmethod
    def least_of_last(column: str, number: int, condition: str) -> str:
        values = f"sort_array(collect_list({column}) FILTER (WHERE {condition}), false)"
        return f"array_min(slice({values}, 1, {number}))"

    def _write(self, frame: Any, folder: Path, rows_per_group: int) -> int:
        options = {"compression": "zstd", "parquet.block.row.count.limit": str(rows_per_group)}
        url = f"file://{folder}"
        with _spark_explained():
            frame.write.options(**options).parquet(url)
            return int(self._spark.read.parquet(url).count())

    def _save(self, name: str, frame: Any) -> None:
        folder = f"file://{self.work / name}"
        with _spark_explained():
            frame.write.parquet(folder)
            self._spark.read.schema(frame.schema).parquet(folder).createOrReplaceTempView(name)


SqlEngine = DuckDBEngine | SparkEngine


def open_engine(
    work: Path, memory: str | None, spark_master: str | None, threads: int | None
) -> SqlEngine:
    """Return an engine with the options of the command; Spark if `spark_master` names it."""
    if spark_master is None:
        return DuckDBEngine(work, memory, threads)
    return SparkEngine(work, spark_master)


@contextmanager
def stage_folder(folder: Path, temp: Path | None) -> Iterator[Path]:
    """Yield a folder of stages in `temp`, or else in `folder`, and remove it."""
    if temp is not None and not temp.is_dir():
        raise ValueError(f"--temp {temp}: no such folder; make it, or name another")
    work = folder / "stages"
    if temp is not None:
        work = Path(tempfile.mkdtemp(prefix="prepare-events-", dir=temp))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _spark_schema(schema: pa.Schema) -> Any:
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(schema)


def _start(builder: Any, master: str) -> Any:
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = builder.master(master).appName("recsys prepare events")
    if master.startswith("local"):
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        builder = builder.config("spark.driver.host", "127.0.0.1")
    try:
        return builder.config(map=AT_START).getOrCreate()
    except Exception as error:
        first = str(error).splitlines()[:1]
        raise ValueError(
            f"--spark-master {master}: Spark does not start {first}; is Java 17 installed?"
        ) from error


@contextmanager
def _spark_explained() -> Iterator[None]:
    """Raise what Spark reports as a ValueError: that of a function in an executor, or its own."""
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        messages = re.findall(r"^ValueError: (.*)", str(error), re.MULTILINE)
        messages += [f"Spark cannot go on: {line}" for line in str(error).splitlines()[:1]]
        raise ValueError(messages[0]) from error


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
    return engine.table(f"SELECT {value} AS x FROM {source}")["x"][0].as_py()


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
