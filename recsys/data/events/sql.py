"""SQL engines that run the stages of `prepare events`, and helpers that write SQL.

A stage is a named table or view. DuckDB runs on one machine and stores stages as Parquet files.
Spark runs locally or on a cluster, whose executors must share its folders and have this package.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.events.parquet_parts import Batches, Complete, slices_by, write_parts
from recsys.extras import missing_extra

if TYPE_CHECKING:
    from recsys.data.events.reader import Reader

FOREVER = 2**62  # later than any time
ROWS_PER_BATCH = 1 << 17
GROUP_ROWS = 8192  # small enough that several ranks share a split evenly
READ_SOON = "FORMAT parquet, COMPRESSION lz4_raw"  # DuckDB's options for files that it reads soon
AT_START = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false"}
SETTINGS = {
    "spark.sql.ansi.enabled": "true",
    "spark.sql.ansi.doubleQuotedIdentifiers": "true",
    "spark.sql.execution.arrow.maxRecordsPerBatch": str(ROWS_PER_BATCH),
}


class BatchFunction(Protocol):
    """A function from the sorted batches of a partition, in order, to batches of `schema`."""

    @property
    def schema(self) -> pa.Schema: ...

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]: ...


class _Results:
    """Base of the engines, with methods that return small results of queries."""

    def table(self, query: str) -> pa.Table:
        """Return a query's result, which must fit into memory."""
        raise NotImplementedError

    def schema(self, stage: str) -> pa.Schema:
        return self.table(f"SELECT * FROM {stage} LIMIT 0").schema

    def value(self, aggregate: str, source: str) -> int:
        """Return an aggregate of `source`, SQL to follow FROM: a stage, maybe with WHERE."""
        return self.table(f"SELECT {aggregate} AS x FROM {source}")["x"][0].as_py()

    def count_rows(self, source: str) -> int:
        """Return the number of rows of `source`, as in `value`."""
        return self.value("count(*)", source)

    def count_by_reason(self, cases: dict[str, str], source: str) -> dict[str, int]:
        """Count the rows of a stage by the first condition in `cases` that holds, "" for none."""
        tests = " ".join(f"WHEN {test} THEN {number}" for number, test in enumerate(cases.values()))
        table = self.table(
            f"SELECT CASE {tests} ELSE {len(cases)} END AS r, count(*) AS n FROM {source} "
            "GROUP BY 1 ORDER BY 1"
        )
        reasons = [*cases, ""]
        return {reasons[row["r"]]: row["n"] for row in table.to_pylist()}


class DuckDBEngine(_Results):
    """Runs stages with DuckDB, which spills to disk; functions of stages run in this process.

    By default DuckDB uses 80 % of the memory and all cores. A full disk or memory is a ValueError,
    as are a `memory` that is no size and `threads` below 1.

    unnest, hash: names of SQL functions: one row per value of a list; several values to 64 bits.
    work: folder of the stages, which all processes of the engine share; the caller removes it.
    scratch: scratch folder, if functions run in this process; else None.
    """

    unnest, hash = "unnest", "hash"

    def __init__(self, work: Path, memory: str | None = None, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"--threads is {threads}; set at least 1")
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        self.scratch: Path | None = work / "values"
        self._threads = threads or len(os.sched_getaffinity(0))
        config: dict[str, Any] = {"temp_directory": str(work / "spilled"), "threads": self._threads}
        with self._explained():
            self._duckdb = duckdb.connect(config=config | {"preserve_insertion_order": False})
        if memory is not None:
            try:
                self._duckdb.execute("SET memory_limit = ?", [memory])
            except duckdb.Error as error:
                raise ValueError(f"--memory is {memory}; write a size such as 4GB") from error

    def close(self) -> None:
        self._duckdb.close()

    def add_files(self, name: str, readers: list[Reader]) -> None:
        """Make a stage of the rows that the readers read; all have the same columns."""
        batches = (
            batch for reader in readers for task in reader.tasks for batch in reader.read(task)
        )
        self._add_batches(name, batches, readers[0].schema)

    def add(self, name: str, query: str) -> None:
        """Make a stage of a query's result."""
        self.read_saved(name, self.save(query, self._new_file(name)))

    def save(self, query: str, file: Path, by: str | None = None) -> list[Path]:
        """Write a query's result as Parquet: `file`, or `BY=VALUE/NAME-*` beside it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        target, options = file, READ_SOON
        if by is not None:
            target, options = file.parent, f"FORMAT parquet, COMPRESSION zstd, PARTITION_BY ({by})"
            options += f", FILENAME_PATTERN '{file.stem}-{{i}}', OVERWRITE_OR_IGNORE"
        with self._explained():
            self._duckdb.execute(f"COPY ({query}) TO {path_literal(target)} ({options})")
        return [file] if by is None else sorted(target.glob(f"*/{file.stem}-*"))

    def read_saved(self, name: str, files: Sequence[Path]) -> None:
        """Make a view of the rows in files that `save` has written."""
        self.view(name, f"SELECT * FROM {parquet_rows(files)}")

    def view(self, name: str, query: str) -> None:
        """Make a view, whose query runs wherever its name is used."""
        with self._explained():
            self._duckdb.execute(f"CREATE VIEW {name} AS {query}")

    def add_mapped(
        self, name: str, query: str, by: list[str], order: list[str], function: BatchFunction
    ) -> None:
        """Make a stage by a function over sorted rows; rows of equal `by` are in one call."""
        ordered = f"SELECT * FROM ({query}) ORDER BY {listed([*by, *order])}"
        self._add_batches(name, function(self._batches(ordered)), function.schema)

    def table(self, query: str) -> pa.Table:
        with self._explained():
            return self._duckdb.sql(query).to_arrow_table()

    def write(
        self, query: str, folder: Path, rows_per_group: int = GROUP_ROWS, complete: Complete = None
    ) -> int:
        """Write a query's rows, after `complete`, as Parquet in order; return their number."""
        batches = self._batches(query, 16 * rows_per_group)
        with self._explained():
            return write_parts(batches, folder, rows_per_group, self._threads, complete)

    def write_by(self, query: str, column: str, folder: Path, complete: Complete) -> None:
        """Write rows that are sorted by a column into a folder for each of its values."""
        for value, slices in groupby(slices_by(self._batches(query), column), itemgetter(0)):
            batches = (batch for _, batch in slices)
            with self._explained():
                write_parts(batches, folder / value, GROUP_ROWS, self._threads, complete)

    @staticmethod
    def first_of_last(number: int, condition: str) -> str:
        """Return SQL of the earliest of the `number` latest times in rows that qualify."""
        return f"list_min(max(ts, {number}) FILTER (WHERE {condition}))"

    def _add_batches(self, name: str, batches: Batches, schema: pa.Schema) -> None:
        file = self._new_file(name)
        # Fast compression, as the file is read soon; its statistics let DuckDB sort narrow keys.
        options = {"compression": "lz4", "use_dictionary": False}
        with self._explained(), pq.ParquetWriter(file, schema, **options) as writer:
            for batch in batches:
                writer.write_batch(batch)
        self.read_saved(name, [file])

    def _new_file(self, name: str) -> Path:
        (self.work / name).mkdir()
        return self.work / name / "part-00000.parquet"

    def _batches(self, query: str, rows: int = ROWS_PER_BATCH) -> Iterator[pa.RecordBatch]:
        with self._explained():
            yield from self._duckdb.sql(query).to_arrow_reader(rows)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise DuckDB's errors as ValueErrors; errors of disk and memory name the folder."""
        try:
            yield
        except (duckdb.IOException, duckdb.OutOfMemoryException, OSError) as error:
            raise ValueError(
                f"{self.work}: cannot go on ({str(error).splitlines()[0]}); free disk space "
                "there, or set --memory to what this machine has"
            ) from error
        except duckdb.Error as error:  # such as values that SQL cannot convert
            raise ValueError(f"DuckDB cannot go on: {str(error).splitlines()[0]}") from error


class SparkEngine(_Results):
    """Runs stages like `DuckDBEngine`, in the active Spark session or a new one at `master`."""

    unnest, hash = "explode", "xxhash64"
    scratch: Path | None = None  # functions run in executors

    def __init__(self, work: Path, master: str) -> None:
        try:
            from pyspark.sql import SparkSession
            from pyspark.sql.pandas.types import from_arrow_schema
        except ImportError as error:
            raise missing_extra("spark", "--engine spark, with Java 17,", error) from error
        active = SparkSession.getActiveSession()
        session: Any = active or _start(SparkSession.builder, master)
        self._started = session if active is None else None
        self._spark = session.newSession()
        for name, value in SETTINGS.items():
            self._spark.conf.set(name, value)
        if self._spark.sparkContext.master.startswith("local"):
            # Spark's default number of tasks is for clusters; here most time would be start-up.
            tasks = self._spark.sparkContext.defaultParallelism
            self._spark.conf.set("spark.sql.shuffle.partitions", tasks)
        self.work, self._schema_of = work, from_arrow_schema

    def close(self) -> None:
        if self._started is not None:
            self._started.stop()

    def add_files(self, name: str, readers: list[Reader]) -> None:
        tasks = [(reader, task) for reader in readers for task in reader.tasks]

        def read(batches: Batches) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                for number in batch.column(0).to_pylist():
                    reader, task = tasks[number]
                    yield from reader.read(task)

        num_partitions = min(len(tasks), 10 * self._spark.sparkContext.defaultParallelism)
        frame = self._spark.range(len(tasks)).repartition(num_partitions)
        self._save(name, frame.mapInArrow(read, self._schema_of(readers[0].schema)))

    def add(self, name: str, query: str) -> None:
        self._save(name, self._spark.sql(query))

    def view(self, name: str, query: str) -> None:
        self._spark.sql(query).createOrReplaceTempView(name)

    def add_mapped(
        self, name: str, query: str, by: list[str], order: list[str], function: BatchFunction
    ) -> None:
        frame = self._spark.sql(query).repartition(*by).sortWithinPartitions(*by, *order)
        self._save(name, frame.mapInArrow(function, self._schema_of(function.schema)))

    def table(self, query: str) -> pa.Table:
        with _spark_explained():
            return self._spark.sql(query).toArrow()

    def write(
        self, query: str, folder: Path, rows_per_group: int = GROUP_ROWS, complete: Complete = None
    ) -> int:
        assert complete is None, "without scratch"
        return self._write(self._spark.sql(query), folder, rows_per_group)

    def write_by(self, query: str, column: str, folder: Path, complete: Complete) -> None:
        assert complete is None, "without scratch"
        frame = self._spark.sql(query)
        values = self.table(f"SELECT DISTINCT {quoted(column)} AS value FROM ({query})")["value"]
        for value in values.to_pylist():
            rows = frame.where(f"{quoted(column)} = '{value}'").drop(column)
            self._write(rows, folder / value, GROUP_ROWS)

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
    def first_of_last(number: int, condition: str) -> str:
        times = f"sort_array(collect_list(ts) FILTER (WHERE {condition}), false)"
        return f"array_min(slice({times}, 1, {number}))"

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


@contextmanager
def open_engine(
    folder: Path,
    temp: Path | None = None,
    memory: str | None = None,
    threads: int | None = None,
    spark_master: str | None = None,
) -> Iterator[SqlEngine]:
    """Yield an engine, Spark if `spark_master` is set, with stages in `temp` or in `folder`."""
    if temp is not None and not temp.is_dir():
        raise ValueError(f"--temp {temp}: no such folder; make it, or name another")
    work = Path(tempfile.mkdtemp(prefix="prepare-events-", dir=temp)) if temp else folder / "stages"
    try:
        if spark_master is None:
            engine: SqlEngine = DuckDBEngine(work, memory, threads)
        else:
            engine = SparkEngine(work, spark_master)
        with closing(engine):
            yield engine
    finally:
        shutil.rmtree(work, ignore_errors=True)


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
    """Raise Spark's errors as ValueErrors, if possible with the message of a failed function."""
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        messages = re.findall(r"^ValueError: (.*)", str(error), re.MULTILINE)
        messages += [f"Spark cannot go on: {line}" for line in str(error).splitlines()[:1]]
        raise ValueError(messages[0]) from error


def parquet_rows(files: Iterable[Path]) -> str:
    """Return SQL that reads files in DuckDB, without columns of folders such as `user=7`."""
    paths = ", ".join(map(path_literal, files))
    return f"read_parquet([{paths}], hive_partitioning = false)"


def path_literal(path: Path) -> str:
    """Return a path as an SQL literal of DuckDB."""
    return "'" + str(path).replace("'", "''") + "'"


def quoted(name: str) -> str:
    """Return a name as an SQL identifier in double quotes."""
    return '"' + name.replace('"', '""') + '"'


def listed(names: Iterable[str]) -> str:
    """Return names as a comma-separated list of SQL identifiers."""
    return ", ".join(map(quoted, names))


def aligned(names: Iterable[str], columns: Mapping[str, str]) -> str:
    """Return SQL of columns in the order of `names`, NULL for names that `columns` lacks."""
    return ", ".join(f"{columns.get(name, 'NULL')} AS {quoted(name)}" for name in names)


def literal(text: str) -> str:
    """Return a text as an SQL literal; a ValueError for quotes, as engines escape differently."""
    if "'" in text or "\\" in text:
        raise ValueError(f"action {text!r}: quotes and backslashes cannot be in it; rename it")
    return f"'{text}'"


def filled(column: str, fill: float | int | str | None) -> str:
    """Return SQL of a column with nulls replaced by `fill`."""
    if fill is None:
        return column
    return f"coalesce({column}, {literal(fill) if isinstance(fill, str) else fill})"
