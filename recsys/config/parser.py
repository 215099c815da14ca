"""The parser of commands and settings: plain data, and errors that name setting, value and fix.

jsonargparse describes a wrong value by the types that it tried. This parser looks up a refused
value in the dataclasses of settings, and describes it by its full name and its allowed values.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from recsys.config.plain_yaml import MODE, RefusedYaml, read_plain

WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
WORDS |= {list: "a list", dict: "a mapping"}
_WORDS_BY_NAME = {kind.__name__: words for kind, words in WORDS.items()}
LONGEST = 300  # characters of a value in a message


class Parser(ArgumentParser):
    """Parser that reads values as plain data and takes no abbreviations.

    An abbreviated option would change its meaning when a setting with the same prefix is added.

    Attributes:
        settings: the dataclass or type of each setting at the top level.
        given: mappings of settings as given, in which a wrong one is looked up.
    """

    def __init__(self, **arguments: Any) -> None:
        """Build a parser with these arguments of `jsonargparse.ArgumentParser`."""
        super().__init__(**{"allow_abbrev": False, "parser_mode": MODE, **arguments})
        self.settings: dict[str, Any] = {}
        self.given: list[dict[str, Any]] = []

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and end with exit code 2, or raise it."""
        known = self._known()
        found = [problem_of_keys(known, given, "") for given in self.given]
        if "the following arguments are required" in message:
            found += [missing_key(self.settings, given, "") for given in self.given]
        message = next(filter(None, found), message)
        if not self.exit_on_error:
            unknown = message.startswith("unrecognized arguments: ")
            super().error(self._in_words(message) if unknown else message, ex)
        sys.stderr.write(f"error: {self._in_words(message)}\n")
        self.exit(2)

    def parse_args(self, args: Sequence[str], *arguments: Any, **named: Any) -> Any:  # type: ignore[override]
        """Parse the words of a command line; options override recipes wherever these stand."""
        words = config_first(args) if self.settings else args
        self._check_keys()
        return super().parse_args(words, *arguments, **named)

    def parse_object(self, *arguments: Any, **named: Any) -> Any:
        """Parse settings in mappings."""
        self._check_keys()
        return super().parse_object(*arguments, **named)

    def _known(self) -> dict[str, Any]:
        """Return the types of all settings, and of the options beside them."""
        return {action.dest: Any for action in self._actions} | self.settings

    def _check_keys(self) -> None:
        """Refuse unknown keys and nulls, which jsonargparse ignores if they are empty."""
        for given in self.given:
            if problem := problem_of_keys(self._known(), given, "", with_values=False):
                self.error(problem)

    def instantiate(self, *arguments: Any, **named: Any) -> Any:
        """Build the settings; a mapping of a wrong type is detected only here."""
        try:
            return super().instantiate(*arguments, **named)
        except TypeError as error:
            self.error(str(error), error)

    def _in_words(self, message: str) -> str:
        """Translate an error of jsonargparse about options into the terms of this program."""
        command = self.prog.replace(" [options]", "")  # such as `recsys prepare movielens`
        if found := re.match(r"unrecognized arguments: (--[^ =]+)", message):
            options = [name for name in self._option_string_actions if name.startswith("--")]
            return f"{command} has no option {found[1]}{meant(found[1], options)}"
        if found := re.match(r"argument subcommand: invalid choice: '(.*)' \(.*?'(.*)'\)", message):
            names = found[2].split("', '")
            return f"{command} has no {found[1]}, but {names}{meant(found[1], names)}"
        if found := re.match(r"the following arguments are required: (.*)", message):
            return f"{command} needs --{found[1].replace(', ', ' and --')}"
        wrong = r'Parser key "([^"]+)":\s+Expected a (.+?)\. Got value: (.*)'
        if found := re.fullmatch(wrong, message, re.DOTALL):
            literal = re.fullmatch(r"typing\.Literal\[(.*)\]", found[2])
            name = found[2].removeprefix("<class '").removesuffix("'>")
            wanted = f"one of {literal[1]}" if literal else _WORDS_BY_NAME.get(name, name)
            return f"{found[1]} is {short(found[3])}; it must be {wanted}"
        union = r'Parser key "([^"]+)":\s+Does not validate.*Subtypes: \[([^\n]*)\]\n.*value: (.*)'
        if found := re.fullmatch(union, message, re.DOTALL):
            kinds = re.findall(r"Literal\[(.*?)\]|<class '(.*?)'>", found[2])
            wanted = " or ".join(
                literal or _WORDS_BY_NAME.get(name, name) for literal, name in kinds
            )
            return f"{found[1]} is {short(found[3])}; it must be {wanted}"
        return message


def config_first(words: Sequence[str]) -> list[str]:
    """Return a command line with its recipes before the options, which then override them.

    Example::

        config_first(["--epochs", "1", "--config", "r.yaml"])
        # ["--config", "r.yaml", "--epochs", "1"]
    """
    moved, others = list[str](), list[str]()
    rest = iter(words)
    for word in rest:
        if word == "--config":
            moved += [word, *itertools.islice(rest, 1)]
        else:
            (moved if word.startswith("--config=") else others).append(word)
    return [*moved, *others]


def problem_of(kind: type, given: dict[str, Any]) -> str | None:
    """Return what is wrong in a file with the settings of a dataclass, None if nothing is."""
    missing = missing_key({"it": kind}, {"it": given}, "")
    return problem_of_value(kind, given, "") or (missing and missing.removeprefix("it."))


def problem_of_keys(
    hints: dict[str, Any], given: dict[str, Any], name: str, with_values: bool = True
) -> str | None:
    """Return what is wrong in a mapping of settings, None if nothing is.

    Args:
        hints: the type of each setting, by key.
        given: the settings, as read from YAML.
        name: full name of the mapping; empty for the whole configuration.
        with_values: False checks for unknown keys and nulls only, which is fast.
    """
    for key, value in given.items():
        key = str(key)
        hint = hints.get(key.removesuffix("+"))
        full = f"{name}.{key}".lstrip(".")
        found = (
            problem_of_value(hint, value, full, with_values) if hint else f"{full} is no setting"
        )
        if found is not None:
            return found if hint else f"{found}{meant(key, hints) or '; remove it'}"
    return None


def problem_of_value(hint: Any, value: Any, name: str, with_values: bool = True) -> str | None:
    """Return what is wrong with the value of a setting of this type, None if nothing is."""
    kind = dataclass_in(hint)
    if hint is not str and isinstance(value, str):
        try:
            inside = read_plain(value)
        except RefusedYaml as error:
            return f"{name}: {short(value)}: {error}"
        except (yaml.YAMLError, UnicodeDecodeError):
            inside = value
        is_inside = inside is None or (kind is not None and isinstance(inside, dict))
        value = inside if is_inside else value
    if value is None and not _allows_null(hint):
        return f"{name} is empty; it must be {in_words(hint)}, or be left out"
    if kind is not None and isinstance(value, dict):
        hints = get_type_hints(kind, include_extras=True)
        if get_origin(hint) is dict:  # one type for settings of any name
            hints = dict.fromkeys(map(str, value), kind)
        return problem_of_keys(hints, value, name, with_values)
    if not with_values or (hint is not kind and _is_of(hint, value)):
        return None
    return f"{name} is {short(value)}; it must be {in_words(hint)}"


def missing_key(hints: dict[str, Any], given: dict[str, Any], name: str) -> str | None:
    """Return the mapping that lacks a required setting, or None; see `problem_of_keys`."""
    for key, value in given.items():
        hint, full = hints.get(str(key).removesuffix("+")), f"{name}.{key}".lstrip(".")
        kind = dataclass_in(hint)
        parts = {full: value}
        if get_origin(hint) is dict and isinstance(value, dict):
            parts = {f"{full}.{part}": settings for part, settings in value.items()}
        for part, settings in parts.items():
            if kind is None or not isinstance(settings, dict):
                continue
            for of in fields(kind):
                if of.default is of.default_factory is MISSING and of.name not in settings:
                    return f"{part} has no {of.name}; add it"
            if found := missing_key(get_type_hints(kind, include_extras=True), settings, part):
                return found
    return None


def _allows_null(hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType, Annotated):
        return any(map(_allows_null, get_args(hint)))
    return hint in (Any, NoneType, None)


def _is_of(hint: Any, value: Any) -> bool:
    """Return whether the parser accepts a value for this type."""
    parser = ArgumentParser(exit_on_error=False, parser_mode=MODE)
    parser.add_argument("--value", type=hint)
    try:
        parser.parse_object({"value": value})
    except Exception:  # types of settings may raise any error
        return False
    return True


def meant(name: str, known: Iterable[str]) -> str:
    """Return a question that suggests a similar name; empty if none is similar."""
    return "".join(f"; did you mean {near}?" for near in get_close_matches(name, list(known), n=1))


def in_words(hint: Any) -> str:
    """Describe the allowed values of a type."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}" if len(parts) > 1 else str(parts[0])
    if origin is Annotated:
        return in_words(parts[0])
    if origin in (Union, UnionType):
        return " or ".join(map(in_words, parts))
    if is_dataclass(hint):
        return "a mapping of settings"
    return WORDS.get(origin or hint, str(hint))


def short(value: Any) -> str:
    """Return a value as text for a message."""
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def dataclass_in(hint: Any) -> type | None:
    """Return the dataclass that a type is, may be (union) or has as values (dict), or None."""
    if isinstance(hint, type) and is_dataclass(hint):
        return hint
    return next((kind for each in get_args(hint) if (kind := dataclass_in(each))), None)
