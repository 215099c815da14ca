"""Runs `recsys semantic-ids`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from recsys.commands.options import add_log_options, require_finished
from recsys.doctor import require_working_installation

logger = logging.getLogger(__name__)

LEVELS, CODES = 3, 256


def add_arguments(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the run, the folder, and the size of the codebooks."""
    add = parser.add_argument
    add("--run", type=Path, required=True, help="finished run with content")
    add("--out", type=Path, required=True, help="a folder to make")
    add("--levels", type=PositiveInt | None, help=f"codes of each item; default: {LEVELS}")
    add("--codes", type=PositiveInt | None, help=f"codes of each level; default: {CODES}")
    add(
        "--codebooks",
        type=Path | None,
        help="folder that this command wrote for the same run: its items keep their ids, others "
        "get theirs by its codebooks",
    )
    text = "also write the dataset with a column semantic_ids to this folder"
    add("--dataset", type=Path | None, help=text)
    add("--data", type=str | None, help="dataset; default: the run's own")
    add_log_options(parser)


def run(arguments: Namespace) -> None:
    """Write the ids and print the collision report."""
    if arguments.codebooks is not None and (arguments.levels or arguments.codes):
        raise ValueError(
            f"--levels and --codes: both are those of --codebooks {arguments.codebooks}; leave "
            "them out, or leave --codebooks out for new ids"
        )
    arguments.run = require_finished(arguments.run)
    require_working_installation()
    from recsys.distributed.log import print_table
    from recsys.distributed.ranks import joined_ranks
    from recsys.serving.retrieval.semantic_folder import export_semantic_ids
    from recsys.serving.retrieval.semantic_ids import format_collisions

    with joined_ranks("cpu") as ranks:
        sizes = arguments.levels or LEVELS, arguments.codes or CODES
        folders = arguments.data, arguments.codebooks, arguments.dataset
        report = export_semantic_ids(arguments.run, arguments.out, *sizes, ranks, *folders)
    print_table(format_collisions(report))
    logger.info("written to %s", arguments.out)
