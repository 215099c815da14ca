"""Runs `recsys package ACTION`."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from recsys.commands.options import Parser, add_log_options
from recsys.doctor import require_working_installation

logger = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the actions, each with its options."""
    add_log_options(parser)
    actions = parser.add_subcommands()

    action = Parser(description="Encode new or changed items and put them into a package.")
    action.add_argument("package", type=Path, help="folder that `recsys export` wrote")
    action.add_argument(
        "--items", type=str, required=True, help="Parquet file with the columns of the items"
    )
    actions.add_subcommand("add-items", action, help=action.description)

    action = Parser(description="Compare all files of a package with their hashes.")
    action.add_argument("package", type=Path, help="folder that `recsys export` wrote")
    actions.add_subcommand("verify", action, help=action.description)


def run(arguments: Namespace) -> None:
    """Change or check a package."""
    actions = {"add-items": _add_items, "verify": _verify}
    actions[arguments.subcommand](arguments[arguments.subcommand])


def _add_items(chosen: Namespace) -> None:
    gc.disable()  # searches for garbage among what is imported take a tenth of this short command
    try:
        require_working_installation(imports_torchrec=False)
        from recsys.serving.new_items.add import add_items

        logger.info("%s: %s", chosen.package, add_items(chosen.package, chosen["items"]))
    finally:
        gc.enable()


def _verify(chosen: Namespace) -> None:
    from recsys.serving.package import read_manifest

    manifest = read_manifest(chosen.package)
    logger.info("%s: %s files are whole", chosen.package, len(manifest.files))
