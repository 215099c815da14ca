"""Spark as an engine, local or a cluster; all executors share its folders and have this package."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from recsys.data.events.reader import Reader
from recsys.data.events.sql import ROWS_PER_BATCH, ROWS_PER_GROUP, BatchFunction, Complete
from recsys.extras import missing_extra

AT_START = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false"}
SETTINGS = {
    "spark.sql.ansi.enabled": "true",
    "spark.sql.ansi.doubleQuotedIdentifiers": "true",
    "spark.sql.execution.arrow.maxRecordsPerBatch": str(ROWS_PER_BATCH),
}


class SparkEngine:
    """A Spark session in the running application, or a new one at `master`.

    The caller removes the folder `work`.

    Raises:
        ValueError: PySpark is not installed, or Spark does not start.
    """

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
        self._save(name, frame.mapInArrow(read, self._schema(readers[0].schema)))

    def add(self, name: str, query: str) -> None:
        self._save(name, self._spark.sql(query))

    def view(self, name: str, query: str) -> None:
        self._spark.sql(query).createOrReplaceTempView(name)

    def add_mapped(
        self, name: str, query: str, by: list[str], order: list[str], function: BatchFunction
    ) -> None:
        frame = self._spark.sql(query).repartition(*by).sortWithinPartitions(*by, *order)
        self._save(name, frame.mapInArrow(function, self._schema(function.schema)))

    def table(self, query: str) -> pa.Table:
        with _explained():
            return self._spark.sql(query).toArrow()

    def write(
        self,
        query: str,
        folder: Path,
        rows_per_group: int = ROWS_PER_GROUP,
        complete: Complete | None = None,
    ) -> int:
        assert complete is None, "without scratch"
        frame = self._spark.sql(query)
        options = {"compression": "zstd", "parquet.block.row.count.limit": str(rows_per_group)}
        url = f"file://{folder}"
        with _explained():
            frame.write.options(**options).parquet(url)
            return int(self._spark.read.parquet(url).count())

    def _save(self, name: str, frame: Any) -> None:
        folder = f"file://{self.work / name}"
        with _explained():
            frame.write.parquet(folder)
            self._spark.read.schema(frame.schema).parquet(folder).createOrReplaceTempView(name)

    @staticmethod
    def _schema(schema: pa.Schema) -> Any:
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
def _explained() -> Iterator[None]:
    """Raise what Spark reports as a ValueError: that of a function in an executor, or its own."""
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        messages = re.findall(r"^ValueError: (.*)", str(error), re.MULTILINE)
        messages += [f"Spark cannot go on: {line}" for line in str(error).splitlines()[:1]]
        raise ValueError(messages[0]) from error
