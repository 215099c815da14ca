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

from recsys import doctor
from recsys.commands import COMMANDS


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
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the rest at once
        sys.stderr.write("interrupted\n")
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def _run(words: Sequence[str]) -> int:
    """Parse the words and run the command; return the exit code."""
    from recsys.config.parser import Parser, meant
    from recsys.distributed.log import configure_logging

    if broken := next((word for word in words if "\0" in word), None):
        raise ValueError(f"{broken!r} has a NUL character, which no name or value may have")
    name = words[0] if words else ""
    if name and not name.startswith("-") and name not in COMMANDS:
        sys.stderr.write(f"error: recsys has no command '{name}'{meant(name, COMMANDS)}\n")
        return 2
    if name not in COMMANDS:
        return _list_commands(name)
    words = words[1:]
    module, line = COMMANDS[name]
    command = import_module(f"recsys.commands.{module}")
    parser = Parser(prog=f"recsys {name}", description=line)
    command.add_arguments(parser, words)
    arguments = parser.instantiate(parser.parse_args(words))
    configure_logging(
        int(os.environ.get("RANK", "0")),
        arguments.get("log_level", "auto"),
        arguments.get("log_format", "text"),
    )
    return command.run(arguments) or 0


def _list_commands(name: str) -> int:
    """Print a line for each command; return 0 if help was asked for, else 2."""
    width = max(map(len, COMMANDS))
    lines = [f"  {command:<{width}}  {line}" for command, (_, line) in COMMANDS.items()]
    print("usage: recsys COMMAND [--option VALUE ...]\n\nTrain and run EM3 recommenders.\n")
    print("\n".join(lines))
    print("\n`recsys COMMAND --help` lists the options of a command.")
    return 0 if name in ("-h", "--help") else 2


def _silence_advice_to_library_developers() -> None:
    """Hide deprecations inside torch and TorchRec, which users of this program cannot fix."""
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")
    # They are shown on every rank while weights are loaded.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    sys.exit(main())
