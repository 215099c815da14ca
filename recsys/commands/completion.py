"""The command that prints a completion script."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Literal

from recsys.commands import COMMANDS
from recsys.extras import require_extra


def completion(shell: Literal["bash", "zsh", "tcsh"], /) -> None:
    """Print a script that completes the commands and their options in a shell.

    Args:
        shell: the shell, as in `eval "$(recsys completion bash)"`
    """
    require_extra("completion", "recsys completion", "shtab")
    import shtab

    print(shtab.complete(_all_commands(), shell=shell))


def _all_commands() -> ArgumentParser:
    """Return one parser of all commands, with the names of their options alone."""
    from recsys.commands.options import command_parser
    from recsys.config.parser import with_hyphens

    root = ArgumentParser("recsys")
    groups = {"": root.add_subparsers()}
    for name, (_, line) in COMMANDS.items():
        first, _, second = name.partition(" ")
        if second and first not in groups:
            groups[first] = groups[""].add_parser(first, help=first).add_subparsers()
        parser = groups[first if second else ""].add_parser(second or first, help=line)
        _, options = command_parser(name, [])
        for action in options._actions:
            names = [with_hyphens(option) for option in action.option_strings]
            if names and "--help" not in names:
                parser.add_argument(*names, help=None)
    return root
