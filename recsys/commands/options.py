"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path

from jsonargparse import ArgumentParser

from recsys.config import LogFormat, LogLevel
from recsys.config.parser import Parser


def add_log_options(parser: ArgumentParser) -> None:
    """Add the options of the log to a command without the settings of a run."""
    text = "lowest level to log; auto: info on rank 0, warning on the others"
    parser.add_argument("--log_level", type=LogLevel, default="auto", help=text)
    parser.add_argument(
        "--log_format", type=LogFormat, default="text", help="text, or json: an object per line"
    )


def add_data_option(parser: ArgumentParser) -> None:
    """Add the dataset."""
    parser.add_argument("--data", type=str, required=True, help="dataset: folder or URL")


def add_run_options(parser: Parser) -> None:
    """Add the options of commands on a finished run."""
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--data", type=str | None, help="dataset; default: the run's own")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda")
    add_log_options(parser)


def require_schema(data: str) -> None:
    """Refuse a dataset without a valid schema before torch is imported.

    The ranks of a job later read it together, so that all of them end with its error.

    Raises:
        ValueError: `schema.yaml` is missing or invalid.
    """
    from recsys.data.filesystem import Location
    from recsys.data.schema import load_schema

    if "RANK" not in os.environ:
        load_schema(Location.of(data), with_vocabularies=False)


def require_finished(run: Path) -> Path:
    """Refuse a folder without a finished run; of a continual one, return its newest partition's.

    Raises:
        ValueError: the folder holds none.
    """
    from recsys.checkpoint.partitions.state import newest_run

    run = newest_run(run)
    if not (run / "metrics.json").is_file():
        raise ValueError(f"{run}: holds no finished run (metrics.json); train it first")
    return run
