"""Runs `recsys evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import Namespace

from recsys.commands.options import add_run_options, require_finished
from recsys.config.parser import Parser
from recsys.doctor import require_working_installation


def add_arguments(parser: Parser, words: Sequence[str]) -> None:
    """Add the run and the split."""
    add_run_options(parser)
    parser.add_argument("--split", type=str, default="test", help="train, valid or test")


def run(arguments: Namespace) -> None:
    """Evaluate the run. A collective."""
    arguments.run = require_finished(arguments.run)
    require_working_installation()
    from recsys.distributed.ranks import joined_ranks
    from recsys.evaluation.predict import evaluate

    with joined_ranks(arguments.device) as ranks:
        evaluate(arguments.run, arguments.data, arguments.split, ranks, arguments.device)
