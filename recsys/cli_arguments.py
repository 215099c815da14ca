"""Arguments of each command of `recsys`.

Slow imports, and imports that a broken installation lacks, are inside the functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

# An abbreviated option would change its meaning when a setting with that beginning is added.
_Parser = partial(ArgumentParser, allow_abbrev=False)


def command_parser(words: Sequence[str]) -> ArgumentParser:
    """Return the parser of all commands; it stores the command's name as `subcommand`.

    Args:
        words: the command line; its ranking model decides the available settings.
    """
    parser = _Parser(prog="recsys", description="Trains and runs EM3 recommenders.")
    commands = parser.add_subcommands()

    command = _Parser(description="Versions, devices and memory; how to fix what is wrong.")
    commands.add_subcommand("doctor", command)

    command = _Parser(description="Makes a dataset of a known source, or the maps of its ids.")
    _add_log_arguments(command)
    commands.add_subcommand("prepare", command)
    sources = command.add_subcommands()
    source = _Parser(description="MovieLens -> the dataset format.")
    source.add_argument("--source", type=Path | None, help="a folder; default: the bundled sample")
    source.add_argument("--out", type=Path, required=True, help="folder of the dataset to write")
    source.add_argument(
        "--split",
        type=Literal["global", "user", "rolling"],
        default="global",
        help="global: one in time; user: each user's ratings in time; rolling: five windows",
    )
    source.add_argument("--history_length", type=int, default=20, help="longest history of a row")
    sources.add_subcommand("movielens", source)
    source = _Parser(description="The maps of raw ids for columns with an exact vocabulary.")
    source.add_argument("--data", type=str, required=True, help="dataset: folder or URL")
    sources.add_subcommand("vocabulary", source)

    _add_looks(commands, words)
    command = _Parser(description="Fills the caches of item content that a model trains with.")
    _add_settings(command, "cache", words)
    command.add_argument("--data", type=str, required=True, help="dataset: folder or URL")
    commands.add_subcommand("cache", command)

    _add_train(commands, words)
    _add_runs(commands)
    _add_export(commands)
    return parser


def _add_log_arguments(command: ArgumentParser) -> None:
    """Add the options of the log to a command without the settings of a run."""
    from recsys.config import LogFormat, LogLevel

    command.add_argument(
        "--log_level",
        type=LogLevel,
        default="auto",
        help="lowest level to log; auto: info on rank 0, warning on the others",
    )
    command.add_argument(
        "--log_format", type=LogFormat, default="text", help="text, or json: an object per line"
    )


def _add_settings(
    command: ArgumentParser, name: str, words: Sequence[str], skip: frozenset[str] = frozenset()
) -> None:
    """Add the settings of a run to a command, if it is the command to run."""
    from recsys.config import add_config_arguments

    if words[:1] == [name]:
        add_config_arguments(command, words, skip)


def _add_train(commands: Any, words: Sequence[str]) -> None:
    """Add `train`."""
    from recsys.checkpoint.run_folder import Resume

    command = _Parser(description="Trains a model; every setting can be overridden.")
    _add_settings(command, "train", words)
    command.add_argument("--data", type=str, required=True, help="dataset: folder or URL")
    command.add_argument("--out", type=Path | None, help="folder of the run to write")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="build all and take one step; no --out is needed, and none is written",
    )
    command.add_argument(
        "--compare",
        type=Literal["id_only"] | None,
        help="id_only: train the same model without content, too, and compare both",
    )
    command.add_argument(
        "--resume",
        type=Resume,
        default="auto",
        help="auto: go on from the run's last checkpoint if there is one; never; must",
    )
    command.add_argument("--overwrite", type=bool, default=False, help="replace an earlier run")
    commands.add_subcommand("train", command)


def _add_runs(commands: Any) -> None:
    """Add the commands on a finished run."""
    command = _Parser(description="Metrics of a finished run on a split.")
    _add_run_arguments(command)
    command.add_argument("--split", type=str, default="test", help="train, valid or test")
    commands.add_subcommand("evaluate", command)

    command = _Parser(description="Adds predictions to Parquet files of impressions.")
    _add_run_arguments(command)
    command.add_argument("--input", type=str, nargs="+", required=True, help="files or folders")
    command.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    commands.add_subcommand("predict", command)
    command = _Parser(description="One HTML page on a finished run, figures inside.")
    _add_run_arguments(command)
    command.add_argument("--out", type=Path | None, help="file; default: RUN/report.html")
    command.add_argument(
        "--colour_by",
        type=str | None,
        help="column of the items' files that colours the maps; default: genres or category",
    )
    commands.add_subcommand("report", command)

    command = _Parser(description="Metrics of runs, and which differences the test users bear out.")
    command.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        required=True,
        help="finished runs; the others are compared to the first",
    )
    command.add_argument("--split", type=str, default="test", help="train, valid or test")
    command.add_argument("--out", type=Path | None, help="JSON file to write the numbers to")
    _add_log_arguments(command)
    commands.add_subcommand("compare", command)


def _add_looks(commands: Any, words: Sequence[str]) -> None:
    """Add the commands that inspect data or settings before any training."""
    from embeddings.simulated_cluster import FigureOverrides

    command = _Parser(description="What is in a dataset, and what to fix before training.")
    command.add_argument("data", type=str, help="dataset: folder or URL")
    command.add_argument(
        "--on_bad_row",
        type=Literal["error", "skip"],
        default="error",
        help="as in training: error ends with the first row that cannot be used",
    )
    command.add_argument("--json", type=Path | None, help="file to write the numbers to")
    _add_log_arguments(command)
    commands.add_subcommand("explain-data", command)

    command = _Parser(description="What a run would be, on any cluster: sizes, plan, time.")
    _add_settings(command, "describe", words, skip=frozenset({"device"}))
    command.add_argument("--data", type=str, required=True, help="dataset: folder or URL")
    command.add_argument(
        "--device",
        type=str,
        default="auto",
        help="a100, h100, h200 or b200, which need not be there; auto, cpu or cuda: as here",
    )
    command.add_argument("--nodes", type=int, default=1, help="machines")
    command.add_argument(
        "--gpus-per-node",
        type=int | None,
        help="ranks of each machine; default: the GPUs that are here, or 1",
    )
    command.add_argument(
        "--rows",
        type=str,
        nargs="+",
        default=[],
        help="TABLE=NUMBER: other numbers of rows than in schema.yaml",
    )
    command.add_class_arguments(FigureOverrides, "figures")
    command.add_argument("--json", type=Path | None, help="file to write the numbers to")
    commands.add_subcommand("describe", command)


def _add_export(commands: Any) -> None:
    """Add `export-tables`."""
    command = _Parser(description="Writes the ID tables of a run to one Parquet file.")
    command.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    command.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    command.add_argument("--table", type=str, nargs="+", help="tables by name; default: all")
    _add_log_arguments(command)
    commands.add_subcommand("export-tables", command)


def _add_run_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of commands on a finished run."""
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--data", type=str | None, help="dataset; default: the run's own")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda")
    _add_log_arguments(parser)
