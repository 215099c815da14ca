"""The command line: `recsys COMMAND`; only the modules of that command are imported."""

import atexit
import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise

from recsys import doctor
from recsys.commands import COMMANDS

HELP = {"-h", "--help"}

atexit.register(gc.freeze)  # else the last garbage collection scans all modules at exit: 1 s
# Libraries make millions of permanent objects; scanning these takes 1/8 of a command's start.
GARBAGE_THRESHOLDS = (50_000, 10, 10)


def main(argv: list[str] | None = None) -> int:
    """Run one command; a user's error is one line and exit code 1."""
    argv = sys.argv[1:] if argv is None else argv
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    if argv == ["doctor"]:  # must work where nothing else can be imported
        return doctor.main()
    _silence_advice_to_library_developers()
    try:
        doctor.require_matching_packages()
        return _run(argv)
    except (ValueError, OSError, doctor.InstallationError) as error:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        # One write, so that the lines of several ranks do not mix.
        sys.stderr.write(f"{rank}error: {error}\n")
        return 1
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
        sys.stderr.write("interrupted\n")
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def _run(argv: Sequence[str]) -> int:
    from recsys.config.parser import meant

    if broken := next((argument for argument in argv if "\0" in argument), None):
        raise ValueError(f"{broken!r} has a NUL character, which no name or value may have")
    argv = _action_first(argv)
    for length in (2, 1):  # such as `prepare events`, then `train`
        name = " ".join(argv[:length])
        if name in COMMANDS:
            return _run_command(name, argv[length:])
    names = [name for name in COMMANDS if name.split()[0] == "".join(argv[:1])]
    if argv and argv[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"recsys {version('recsys-em3')}")
        return 0
    if argv and not argv[0].startswith("-") and not (names and set(argv[1:]) <= HELP):
        command, candidates = (" ".join(argv[:2]), names) if names else (argv[0], list(COMMANDS))
        sys.stderr.write(f"error: recsys has no command '{command}'{meant(command, candidates)}\n")
        return 2
    _print_commands(names or list(COMMANDS))
    return 0 if HELP & {*argv} else 2


def _action_first(argv: Sequence[str]) -> Sequence[str]:
    """Put the action of `prepare --log-level debug events` before the options."""
    for index, (previous, argument) in enumerate(pairwise(argv), 1):
        is_value = previous.startswith("--") and "=" not in previous
        if f"{argv[0]} {argument}" in COMMANDS and not is_value:
            return [argv[0], argument, *argv[1:index], *argv[index + 1 :]]
    return argv


def _run_command(name: str, argv: Sequence[str]) -> int:
    from recsys.commands.options import command_parser, options_of
    from recsys.distributed.log import configure_logging

    command, parser = command_parser(name, argv)
    arguments = parser.instantiate(parser.parse_args(argv))
    rank = int(os.environ.get("RANK", "0"))
    configure_logging(rank, arguments["log_level"], arguments["log_format"])
    positional, keywords = options_of(command, arguments)
    return command(*positional, **keywords) or 0


def _print_commands(names: Sequence[str]) -> None:
    width = max(map(len, names))
    print("usage: recsys COMMAND [--option VALUE ...]\n\nTrain and run EM3 recommenders.\n")
    print("\n".join(f"  {name:<{width}}  {COMMANDS[name][1]}" for name in names))
    print("\n`recsys COMMAND --help` lists the options of a command, `recsys --version` prints")
    print("the version, and `recsys completion SHELL` a script for your shell.")


def _silence_advice_to_library_developers() -> None:
    """Hide deprecations inside torch and TorchRec, which users cannot fix."""
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")
    # Each rank would show progress bars while weights are loaded.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    sys.exit(main())
