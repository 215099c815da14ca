"""Runs `recsys report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from recsys.commands.options import add_run_options, require_finished
from recsys.config.parser import Parser
from recsys.doctor import require_working_installation


def add_arguments(parser: Parser, words: Sequence[str]) -> None:
    """Add the run and the page."""
    add_run_options(parser)
    parser.add_argument("--out", type=Path | None, help="file; default: RUN/report.html")
    text = "column of the items' files that colours the maps; default: genres or category"
    parser.add_argument("--colour_by", type=str | None, help=text)


def run(arguments: Namespace) -> None:
    """Write the page. A collective."""
    out = arguments.out or arguments.run / "report.html"
    arguments.run = require_finished(arguments.run)
    require_working_installation()
    from recsys.diagnostics.run_report.command import report_run
    from recsys.distributed.ranks import joined_ranks

    with joined_ranks(arguments.device) as ranks:
        report_run(arguments.run, arguments.data, out, ranks, arguments.device, arguments.colour_by)
