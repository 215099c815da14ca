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

    action = Parser(description="Write what differs between two packages into one file.")
    action.add_argument("base", type=Path, help="the older package, which the receiver has")
    action.add_argument("new", type=Path, help="the newer package")
    action.add_argument("--out", type=Path, required=True, help="file to write")
    actions.add_subcommand("delta", action, help=action.description)

    action = Parser(description="Make the newer package of the older one and a delta.")
    action.add_argument("package", type=Path, help="the older package")
    action.add_argument("--delta", type=Path, required=True, help="what `package delta` wrote")
    action.add_argument("--out", type=Path, required=True, help="folder of the newer package")
    actions.add_subcommand("apply", action, help=action.description)


def run(arguments: Namespace) -> None:
    """Change or check a package."""
    actions = {"add-items": _add_items, "verify": _verify, "delta": _delta, "apply": _apply}
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


def _delta(chosen: Namespace) -> None:
    from recsys.checkpoint.output_file import check_output
    from recsys.data.filesystem import Location
    from recsys.serving.delta.write import write_delta

    check_output(chosen.out, [Location.of(each) for each in (chosen.base, chosen.new)])
    logger.info("%s: %s", chosen.out, write_delta(chosen.base, chosen.new, chosen.out))


def _apply(chosen: Namespace) -> None:
    from recsys.serving.delta.apply import apply_delta

    manifest = apply_delta(chosen.package, chosen.delta, chosen.out)
    logger.info("%s: %s files are whole", chosen.out, len(manifest.files))
