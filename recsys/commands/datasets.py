"""Commands that make and describe datasets: prepare SOURCE and explain-data."""

import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)


def prepare_events(
    config: Path,
    out: Path,
    source: Path | None = None,
    memory: str | None = None,
    threads: int | None = None,
    temp: Path | None = None,
    engine: Literal["duckdb", "spark"] = "duckdb",
    spark_master: str = "local[*]",
    until: str | None = None,
    follow: float | None = None,
) -> None:
    """Write a dataset of event logs, as an events.yaml describes it.

    Args:
        config: events.yaml with the settings
        out: folder of the dataset to write
        source: folder of the logs; default: that of events.yaml
        memory: most memory of DuckDB, such as 4GB; default: 80 % of the machine's
        threads: threads of DuckDB; default: the cores there are
        temp: folder for temporary files; default: the output's
        engine: duckdb: this machine; spark: needs PySpark and Java 17
        spark_master: address of the Spark cluster
        until: last day to write, such as 2026-11-05; each call reads new files and writes new days
        follow: seconds between looks for new files, whose days are written, until SIGTERM
    """
    from recsys.data.events.daily import prepare_days
    from recsys.data.events.follow import follow_files
    from recsys.data.events.load import load_events_config
    from recsys.data.events.prepare import format_report
    from recsys.data.events.prepare import prepare_events as prepare
    from recsys.distributed.log import print_table

    def show(report: dict[str, Any]) -> None:
        print_table(format_report(report))
        logger.info("written to %s", out)

    options: dict[str, Any] = {"source": source, "memory": memory, "threads": threads, "temp": temp}
    options["spark_master"] = spark_master if engine == "spark" else None
    if follow is None:
        show(prepare(config, out, until=until, **options))
        return
    calendar = load_events_config(config, source).calendar
    follow_files(calendar, follow, partial(prepare_days, config, out, **options), show, until)


def prepare_movielens(
    out: Path,
    source: Path | None = None,
    split: Literal["global", "user", "rolling"] = "global",
    history_length: int = 20,
) -> None:
    """Write the ratings and movies of MovieLens as a dataset.

    Args:
        out: folder of the dataset to write
        source: a folder; default: the bundled sample
        split: global: one in time; user: each user's ratings in time; rolling: five windows
        history_length: longest history of a row
    """
    from recsys.data.events.prepare import format_splits
    from recsys.data.movielens.prepare import prepare_movielens as prepare
    from recsys.distributed.log import print_table

    print_table(format_splits(prepare(source, out, history_length, split), "liked"))
    logger.info("written to %s", out)


def prepare_vocabulary(data: str) -> None:
    """Write the maps of raw ids for columns with an exact vocabulary.

    Args:
        data: dataset: folder or URL
    """
    from recsys.data.prepare import format_prepared, prepare_vocabularies
    from recsys.distributed.log import print_table

    print_table(format_prepared(prepare_vocabularies(data)))


def prepare_transforms(data: str) -> None:
    """Fit the transforms of columns on the training rows.

    Args:
        data: dataset: folder or URL
    """
    from recsys.data.prepare import format_fitted
    from recsys.data.prepare import prepare_transforms as prepare
    from recsys.distributed.log import print_table

    print_table(format_fitted(prepare(data)))


def explain_data(
    data: str, /, on_bad_row: Literal["error", "skip"] = "error", json: Path | None = None
) -> None:
    """Describe a dataset, and what to fix in it before training.

    Args:
        data: dataset: folder or URL
        on_bad_row: as in training: error ends with the first row that cannot be used
        json: file to write the numbers to
    """
    from recsys.diagnostics.dataset.findings import explain_data as explain

    explain(data, on_bad_row, json)
