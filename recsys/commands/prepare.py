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

    source = Parser(description="Write the maps of raw ids for columns with an exact vocabulary.")
    add_data_option(source)
    sources.add_subcommand("vocabulary", source, help=source.description)


def run(arguments: Namespace) -> None:
    """Make the dataset, or the maps."""
    chosen = arguments[arguments.subcommand]
    if arguments.subcommand == "vocabulary":
        _prepare_vocabulary(chosen)
    else:
        _prepare_movielens(chosen)


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
