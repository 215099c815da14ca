"""Runs `recsys prepare SOURCE`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from recsys.commands.options import Parser, add_data_option, add_log_options

logger = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the sources, each with its options."""
    add_log_options(parser)
    sources = parser.add_subcommands()

    source = Parser(description="Write the ratings and movies of MovieLens as a dataset.")
    source.add_argument("--source", type=Path | None, help="a folder; default: the bundled sample")
    source.add_argument("--out", type=Path, required=True, help="folder of the dataset to write")
    source.add_argument(
        "--split",
        type=Literal["global", "user", "rolling"],
        default="global",
        help="global: one in time; user: each user's ratings in time; rolling: five windows",
    )
    source.add_argument("--history_length", type=int, default=20, help="longest history of a row")
    sources.add_subcommand("movielens", source, help=source.description)

    source = _events()
    sources.add_subcommand("events", source, help=source.description)

    source = Parser(description="Write the maps of raw ids for columns with an exact vocabulary.")
    add_data_option(source)
    sources.add_subcommand("vocabulary", source, help=source.description)

    source = Parser(description="Fit the transforms of columns on the training rows.")
    add_data_option(source)
    sources.add_subcommand("transforms", source, help=source.description)


def _events() -> Parser:
    """Return the options of `prepare events`."""
    source = Parser(description="Write a dataset of event logs, as an events.yaml describes it.")
    add = source.add_argument
    add("--config", type=Path, required=True, help="events.yaml with the settings")
    add("--out", type=Path, required=True, help="folder of the dataset to write")
    add("--source", type=Path | None, help="folder of the logs; default: that of events.yaml")
    text = "most memory of DuckDB, such as 4GB; default: 80 % of the machine's"
    add("--memory", type=str | None, help=text)
    add("--threads", type=int | None, help="threads of DuckDB; default: the cores there are")
    add("--temp", type=Path | None, help="folder for temporary files; default: the output's")
    text = "duckdb: this machine; spark: needs PySpark and Java 17"
    add("--engine", type=Literal["duckdb", "spark"], default="duckdb", help=text)
    add("--spark_master", type=str, default="local[*]", help="address of the Spark cluster")
    return source


def run(arguments: Namespace) -> None:
    """Make the dataset, or what `schema.yaml` needs."""
    sources = {
        "events": _prepare_events,
        "movielens": _prepare_movielens,
        "vocabulary": _prepare_vocabulary,
        "transforms": _prepare_transforms,
    }
    sources[arguments.subcommand](arguments[arguments.subcommand])


def _prepare_events(chosen: Namespace) -> None:
    from recsys.data.events.prepare import format_report, prepare_events
    from recsys.distributed.log import print_table

    master = chosen.spark_master if chosen.engine == "spark" else None
    report = prepare_events(
        chosen.config, chosen.out, chosen.source, chosen.memory, master, chosen.threads, chosen.temp
    )
    print_table(format_report(report))
    logger.info("written to %s", chosen.out)


def _prepare_movielens(chosen: Namespace) -> None:
    from recsys.data.movielens.prepare import format_summary, prepare_movielens
    from recsys.distributed.log import print_table

    summary = prepare_movielens(chosen.source, chosen.out, chosen.history_length, chosen.split)
    print_table(format_summary(summary))
    logger.info("written to %s", chosen.out)


def _prepare_vocabulary(chosen: Namespace) -> None:
    from recsys.data.prepare_vocabulary import format_prepared, prepare_vocabularies
    from recsys.distributed.log import print_table

    print_table(format_prepared(prepare_vocabularies(chosen.data)))


def _prepare_transforms(chosen: Namespace) -> None:
    from recsys.data.transforms.prepare import format_fitted, prepare_transforms
    from recsys.distributed.log import print_table

    print_table(format_fitted(prepare_transforms(chosen.data)))
