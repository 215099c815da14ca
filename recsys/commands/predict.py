"""Runs `recsys predict`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from recsys.commands.options import add_run_options, require_finished
from recsys.config.parser import Parser
from recsys.doctor import require_working_installation


def add_arguments(parser: Parser, words: Sequence[str]) -> None:
    """Add the run, the input and the output."""
    add_run_options(parser)
    parser.add_argument("--input", type=str, nargs="+", required=True, help="files or folders")
    parser.add_argument("--out", type=Path, required=True, help="Parquet file to write")


def run(arguments: Namespace) -> None:
    """Write the input with predictions. A collective."""
    arguments.run = require_finished(arguments.run)
    require_working_installation()
    from recsys.distributed.ranks import joined_ranks
    from recsys.evaluation.predict import predict

    with joined_ranks(arguments.device) as ranks:
        predict(
            arguments.run, arguments.input, arguments.out, arguments.data, ranks, arguments.device
        )
