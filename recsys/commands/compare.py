"""Runs `recsys compare`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from recsys.commands.options import add_log_options
from recsys.config.parser import Parser

logger = logging.getLogger(__name__)


def add_arguments(parser: Parser, words: Sequence[str]) -> None:
    """Add the runs and the split."""
    add = parser.add_argument
    text = "finished runs; the others are compared to the first"
    add("--runs", type=Path, nargs="+", required=True, help=text)
    add("--split", type=str, default="test", help="train, valid or test")
    add("--out", type=Path | None, help="JSON file to write the numbers to")
    add_log_options(parser)


def run(arguments: Namespace) -> None:
    """Print the comparison."""
    from recsys.checkpoint.output_file import check_output
    from recsys.checkpoint.partitions.state import newest_run
    from recsys.distributed.log import print_table
    from recsys.evaluation.compare import compare_runs, format_comparison, write_comparison

    if arguments.out is not None:
        check_output(arguments.out)
    report = compare_runs([newest_run(run) for run in arguments.runs], arguments.split)
    print_table(format_comparison(report))
    if arguments.out is not None:
        write_comparison(report, arguments.out)
        logger.info("written to %s", arguments.out)
