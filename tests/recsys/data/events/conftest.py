"""Spark for tests, where PySpark and Java are."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recsys.data.events.sql import SqlEngine

# A log of a test has a hundred rows: compiling its queries takes several times as long as they do.
SMALL = (
    '--driver-java-options "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC" '
    "--conf spark.sql.codegen.wholeStage=false --conf spark.sql.codegen.factoryMode=NO_CODEGEN "
    "--conf spark.sql.adaptive.enabled=false pyspark-shell"
)


@pytest.fixture(scope="session")
def open_spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], SqlEngine]]:
    """Open engines in one Spark application, whose start takes longer than a test."""
    if importlib.util.find_spec("pyspark") is None:
        pytest.skip("PySpark is not installed: python3 launch/install.py --extra spark")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java 17, and no java is on the PATH")
    from recsys.data.events.sql import SparkEngine

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_SUBMIT_ARGS", SMALL)
        application = SparkEngine(tmp_path_factory.mktemp("spark"), "local[2]")
        yield lambda work: SparkEngine(work, "local[2]")
        application.close()
