"""Runs `recsys export-tables`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from recsys.commands.options import add_log_options, require_finished
from recsys.config.parser import Parser
from recsys.doctor import require_working_installation

logger = logging.getLogger(__name__)


def add_arguments(parser: Parser, words: Sequence[str]) -> None:
    """Add the run, the file and the tables."""
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    parser.add_argument("--table", type=str, nargs="+", help="tables by name; default: all")
    add_log_options(parser)


def run(arguments: Namespace) -> None:
    """Write the tables."""
    arguments.run = require_finished(arguments.run)
    require_working_installation()
    from recsys.checkpoint.compatibility import check_config
    from recsys.checkpoint.files import BEST, check_files
    from recsys.checkpoint.manifest import read_manifest
    from recsys.checkpoint.table_export import export_tables, require_model_alone
    from recsys.config import load_config
    from recsys.data.filesystem import recover_folder

    best = arguments.run / "checkpoints" / BEST
    recover_folder(best)
    manifest = read_manifest(best)
    check_files(best, manifest)
    require_model_alone(best)
    check_config(manifest["config"], load_config(arguments.run / "config.yaml"), str(best))
    counts = export_tables(best, arguments.out, arguments.table)
    for name, rows in counts.items():
        logger.info("table %s: %s rows", name, f"{rows:,}")
    logger.info("written to %s", arguments.out)
