"""Runs `recsys continual`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from recsys.commands.options import add_data_option, require_finished, require_schema
from recsys.config import Config, add_config_arguments, config_from
from recsys.config.parser import Parser
from recsys.doctor import require_working_installation


def add_arguments(parser: Parser, words: Sequence[str]) -> None:
    """Add the settings of a run, the dataset, and the partitions to walk."""
    add_config_arguments(parser, words)
    add_data_option(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the continual run")
    text = "value of the first partition, such as 2026-11-01 or 2026-11-01/05"
    add("--from", dest="first", type=str | None, help=text)
    add("--until", dest="last", type=str | None, help="value of the last partition")
    text = "wait for the next partition (its _SUCCESS, or continual.quiet_seconds) until SIGTERM"
    add("--follow", action="store_true", help=text)
    add("--warm-start", type=Path | None, help="begin the first partition with this run's state")


def run(arguments: Namespace) -> int:
    """Walk the partitions; return the exit code. A collective."""
    config = config_from(arguments)
    require_schema(arguments.data)
    if arguments.warm_start is not None:
        arguments.warm_start = require_finished(arguments.warm_start)
    require_working_installation()
    from recsys.distributed.lockstep import TrainingStopped

    try:
        _walk(config, arguments)
    except TrainingStopped:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(
                f"asked to end; {arguments.out} has the state, and the same command goes on from it"
                "\n"
            )
        return 0 if arguments.follow else 128 + signal.SIGTERM
    return 0


def _walk(config: Config, arguments: Namespace) -> None:
    """Walk the partitions. A collective."""
    from recsys.checkpoint.warm_start.request import WarmStart
    from recsys.distributed.ranks import joined_ranks
    from recsys.training.continual.queue import Span
    from recsys.training.continual.walk import Request, train_continually

    warm_start = None if arguments.warm_start is None else WarmStart(arguments.warm_start)
    request = Request(Span(arguments.first, arguments.last), arguments.follow, warm_start)
    with joined_ranks(config.device) as ranks:
        train_continually(config, arguments.data, arguments.out, ranks, request)
