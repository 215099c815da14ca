"""Runs `recsys export`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from recsys.commands.options import add_log_options, require_finished
from recsys.doctor import require_working_installation

logger = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the run, the package and the type of its tables."""
    add = parser.add_argument
    add("--run", type=Path, required=True, help="folder of a finished run")
    add("--out", type=Path, required=True, help="package: a folder to make")
    text = "type of the ID tables; content vectors are in fp32 with fp32, else in fp16"
    add("--tables", type=Literal["fp32", "fp16", "int8", "int4"], default="fp32", help=text)
    add("--data", type=str | None, help="dataset; default: the run's own")
    text = "compile the graph for this kind of processor; auto: if there is a C++ compiler"
    add("--compile", type=bool | Literal["auto"], default="auto", help=text)
    add_log_options(parser)


def run(arguments: Namespace) -> None:
    """Write the package."""
    arguments.run = require_finished(arguments.run)
    require_working_installation()
    from recsys.distributed.ranks import joined_ranks
    from recsys.serving.export import export_run

    with joined_ranks("cpu") as ranks:
        manifest = export_run(
            *(arguments.run, arguments.out, arguments.tables, ranks, arguments.data),
            compiles=arguments.compile,
        )
    size = sum(of_file["bytes"] for of_file in manifest.files.values())
    logger.info("%s: %s files, %.1f MB", arguments.out, len(manifest.files), size / 1e6)
