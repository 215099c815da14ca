"""The command line: `recsys COMMAND`, with a recipe, a dataset or a run.

The commands are the modules of `recsys.commands`; only that of the command to run is imported.
`cache`, `train`, `evaluate`, `predict` and `report` run alone or under torchrun and torchx
unchanged.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from recsys import doctor
from recsys.commands import COMMANDS

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def main(words: list[str] | None = None) -> int:
    """Run one command; a user's error is one line and exit code 1."""
    words = sys.argv[1:] if words is None else words
    if words == ["doctor"]:  # must work where nothing else can be imported
        return doctor.main()
    _silence_advice_to_library_developers()
    try:
        doctor.require_matching_packages()
        return _run(words)
    except (ValueError, OSError, doctor.InstallationError) as error:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        # One write, so that the lines of several ranks do not mix.
        sys.stderr.write(f"{rank}error: {error}\n")
        return 1
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another one ends what is left at once
        sys.stderr.write("interrupted\n")
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def _run(words: Sequence[str]) -> int:
    """Parse the words and run the command; return the exit code."""
    from recsys.distributed.log import configure_logging

    parser = command_parser(words)
    if not words:
        parser.print_help()
        return 2
    arguments = parser.instantiate(parser.parse_args(words))
    chosen = arguments[arguments.subcommand]
    configure_logging(
        int(os.environ.get("RANK", "0")),
        chosen.get("log_level", "auto"),
        chosen.get("log_format", "text"),
    )
    return _module(arguments.subcommand).run(chosen) or 0


def command_parser(words: Sequence[str]) -> ArgumentParser:
    """Return the parser of all commands; it stores the command's name as `subcommand`.

    Args:
        words: the command line; only its command gets its options.
    """
    from recsys.commands.options import Parser

    parser = Parser(prog="recsys", description="Train and run EM3 recommenders.")
    commands = parser.add_subcommands()
    for name, (_, help_line) in COMMANDS.items():
        command = Parser(description=help_line)
        commands.add_subcommand(name, command, help=help_line)
        if words[:1] == [name]:
            _module(name).add_arguments(command, words)
    return parser


def _module(command: str) -> ModuleType:
    """Import the module of a command."""
    return import_module(f"recsys.commands.{COMMANDS[command][0]}")


def _silence_advice_to_library_developers() -> None:
    """Hide deprecations inside torch and TorchRec, which users of this program cannot fix."""
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")
    os.environ.setdefault(
        "HF_HUB_DISABLE_PROGRESS_BARS", "1"
    )  # shown on every rank while loading weights


if __name__ == "__main__":
    sys.exit(main())
