"""Options of commands from signatures and docstrings, shell completion, and checks of folders.

Folders are checked before torch is imported, so that errors appear at once.
"""

import inspect
import os
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import Namespace

from recsys.commands import COMMANDS
from recsys.config import Config, LogFormat, LogLevel, add_config_arguments, config_from
from recsys.config.parser import Parser, with_hyphens, with_underscores
from recsys.extras import require_extra
from recsys.storage.files import home_expanded

Command = Callable[..., int | None]
POSITIONAL = inspect.Parameter.POSITIONAL_ONLY
LOG_OPTIONS = {
    "log_level": (LogLevel, "auto", "lowest level; auto: info on rank 0, warning on the others"),
    "log_format": (LogFormat, "text", "text, or json: an object per line"),
}


def command_parser(name: str, argv: Sequence[str]) -> tuple[Command, Parser]:
    """Return a command of COMMANDS and its parser.

    The command line `argv` chooses the ranking model, and thereby the settings under `ranking`.
    """
    module, _, attribute = COMMANDS[name][0].partition(":")
    path = module if "." in module else f"recsys.commands.{module}"
    command: Command = getattr(import_module(path), attribute)
    documented = docstring_parser.parse(command.__doc__ or "")
    texts = {
        text.arg_name: " ".join((text.description or "").split()) for text in documented.params
    }
    parser = Parser(prog=f"recsys {name}", description=documented.short_description)
    hints = get_type_hints(command)
    parameters = inspect.signature(command).parameters
    parser.options = {key: hints[key] for key in parameters}
    for key, parameter in parameters.items():
        hint, is_required = hints[key], parameter.default is parameter.empty
        if hint is Config:
            add_config_arguments(parser, with_underscores(argv), skip=frozenset(parameters))
        elif is_dataclass(hint):  # its fields are options of the command
            parser.add_class_arguments(hint, None, skip=set(parameters))
            parser.options |= get_type_hints(hint)
        elif parameter.kind is POSITIONAL:
            parser.add_argument(key, type=hint, help=texts[key])
        else:
            lists = [inner for inner in (hint, *get_args(hint)) if get_origin(inner) is list]
            repeated: dict[str, Any] = {"type": hint}
            if lists:  # `--input A --input B` and `--input A B` are the same
                repeated = {"nargs": "+", "type": get_args(lists[0])[0], "action": "extend"}
            default = {"required": True} if is_required else {"default": parameter.default}
            parser.add_argument(f"--{key}", help=texts[key], **repeated, **default)
    if Config not in hints.values():
        for key, (hint, value, text) in LOG_OPTIONS.items():
            if key not in parser.options:
                parser.add_argument(f"--{key}", type=hint, default=value, help=text)
    return command, parser


def options_of(command: Command, arguments: Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional and the named arguments of a command, as parsed."""
    values, positional, hints = dict[str, Any](), list[Any](), get_type_hints(command)
    for key, parameter in inspect.signature(command).parameters.items():
        hint = hints[key]
        if hint is Config:
            values[key] = config_from(arguments)
        elif isinstance(hint, type) and is_dataclass(hint):
            names = [name for name in get_type_hints(hint) if name in arguments]
            values[key] = hint(**{name: arguments[name] for name in names})
        else:
            values[key] = _local(key, arguments[key])
        if parameter.kind is POSITIONAL:
            positional.append(values.pop(key))
    return positional, values


def _local(key: str, value: Any) -> Any:
    """Expand `~` in a path, as shells do not in `--out=~/run`; a URL is a ValueError."""
    if isinstance(value, list):
        return [_local(key, item) for item in value]
    if not isinstance(value, Path):
        return value
    try:
        return home_expanded(value)
    except ValueError as error:
        raise ValueError(f"{key.replace('_', '-')}: {error}") from error


def require_schema(data: str) -> None:
    """Raise a ValueError for a dataset without a valid schema.

    In a job of several ranks do nothing: they read the schema later, and all raise its error.
    """
    from recsys.data.schema import load_schema
    from recsys.storage.location import Location

    if "RANK" not in os.environ:
        load_schema(Location.of(data), with_vocabularies=False)


def require_finished(run: Path) -> Path:
    """Return the finished run in a folder, or of a continual run's newest partition."""
    from recsys.checkpoint.partitions import newest_run

    run = newest_run(run)
    if not (run / "metrics.json").is_file():
        raise ValueError(f"{run}: holds no finished run (metrics.json); train it first")
    return run


def completion(shell: Literal["bash", "zsh", "tcsh"], /) -> None:
    """Print a script that completes the commands and their options in a shell.

    Args:
        shell: the shell, as in `eval "$(recsys completion bash)"`
    """
    require_extra("completion", "recsys completion", "shtab")
    import shtab

    print(shtab.complete(_all_commands(), shell=shell))


def _all_commands() -> ArgumentParser:
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
