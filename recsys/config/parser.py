"""The command-line parser: values are plain data; errors name setting, value and fix."""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from recsys.config.plain_yaml import MODE, RefusedYaml, load_plain_yaml

TEXTS = {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
TEXTS |= {list: "a list", dict: "a mapping"}
_TEXTS_BY_NAME = {kind.__name__: text for kind, text in TEXTS.items()}
LONGEST = 300  # largest number of characters of a value in a message


class Parser(ArgumentParser):
    """A jsonargparse parser that reads values as plain data and accepts no abbreviated options."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "parser_mode": MODE, **arguments})
        self.settings: dict[str, Any] = {}  # dataclass or type of each top-level setting
        self.options: dict[str, Any] = {}  # types of options that are no settings
        self.values: list[dict[str, Any]] = []  # settings as users wrote them, for error messages
        self.removed: frozenset[str] = frozenset()  # modalities that options set to null

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        required = message.partition("the following arguments are required: ")[2]
        is_missing = bool(required) and self.options.keys().isdisjoint(required.split(", "))
        hints = self._hints()
        problems = (
            problem_of_keys(hints, mapping, "", with_required=is_missing) for mapping in self.values
        )
        message = next(filter(None, problems), message)
        if not self.exit_on_error:
            is_unknown = message.startswith("unrecognized arguments: ")
            super().error(self._explained(message) if is_unknown else message, ex)
        sys.stderr.write(f"error: {self._explained(message)}\n")
        self.exit(2)

    def parse_args(self, args: Sequence[str], *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
        """Parse command-line arguments; options override recipes, whatever their order."""
        groups = option_groups(with_underscores(args))
        if self.settings:
            groups = config_first(groups)
        hints, tokens = self.options | self.settings, list[str]()
        for group in groups:
            name, equals, _ = group[0].removeprefix("--").partition("=")
            if name in self.removed:
                tokens += group[1 if equals else 2 :]
                continue
            is_flag = group == [f"--{name}"] and _allows(bool, _hint_at(hints, name.split(".")))
            tokens += [*group, "true"] if is_flag else group
        self._check_keys()
        return super().parse_args(tokens, *arguments, **options)

    def parse_object(self, *arguments: Any, **options: Any) -> Any:
        self._check_keys()
        return super().parse_object(*arguments, **options)

    def format_help(self, *arguments: Any) -> str:
        return with_hyphens(super().format_help(*arguments))

    def _hints(self) -> dict[str, Any]:
        return {action.dest: Any for action in self._actions} | self.settings

    def _check_keys(self) -> None:
        """Raise for unknown keys and for nulls, as jsonargparse ignores empty ones."""
        for mapping in self.values:
            if problem := problem_of_keys(self._hints(), mapping, "", with_values=False):
                self.error(problem)

    def instantiate(self, *arguments: Any, **options: Any) -> Any:
        """Build the settings; only this step detects a mapping of a wrong type."""
        try:
            return super().instantiate(*arguments, **options)
        except TypeError as error:
            self.error(str(error), error)

    def _explained(self, message: str) -> str:
        command = self.prog.replace(" [options]", "")  # such as `recsys prepare movielens`
        if match := re.match(r"unrecognized arguments: (--[^ =]+)", message):
            names = [name for name in self._option_string_actions if name.startswith("--")]
            return with_hyphens(f"{command} has no option {match[1]}{meant(match[1], names)}")
        if match := re.match(r"the following arguments are required: (.*)", message):
            return with_hyphens(f"{command} needs --{match[1].replace(', ', ' and --')}")
        limited = r'Parser key "([^"]+)":\s+Not of type PositiveInt: (?:.*\'(.*)\'|(\S+) does .*)'
        if match := re.fullmatch(limited, message, re.DOTALL):
            value = (match[2] or match[3]).replace("NoneType", "null")
            return with_hyphens(f"--{match[1]} is {short(value)}; it must be an integer above 0")
        one = r'Parser key "([^"]+)":\s+Expected a (.+?)\. Got value: (.*)'
        union = r'Parser key "([^"]+)":\s+Does not validate.*Subtypes: \[([^\n]*)\]\n.*value: (.*)'
        match = re.fullmatch(one, message, re.DOTALL) or re.fullmatch(union, message, re.DOTALL)
        if match is None:
            return message
        kinds = re.findall(r"Literal\[(.*?)\]|<class '(.*?)'>", match[2]) or [("", match[2])]
        allowed = " or ".join(literal or _TEXTS_BY_NAME.get(name, name) for literal, name in kinds)
        prefix = "one of " if len(kinds) == 1 and kinds[0][0] else ""
        return f"{match[1]} is {short(match[3])}; it must be {prefix}{allowed}"


# Settings whose keys users choose; these keys keep their hyphens.
CHOSEN_BY_USERS = (
    r"(content\.modalities|embedding\.tables|auxiliary|metrics|ranking\.label_weights)"
)


def with_underscores(tokens: Sequence[str]) -> list[str]:
    """Replace hyphens in option names by underscores: `--batch-size 8` becomes `--batch_size 8`."""
    return [_with_underscores(token) if token.startswith("--") else token for token in tokens]


def _with_underscores(token: str) -> str:
    option, equals, value = token[2:].partition("=")
    spelled = option.replace("-", "_")
    if name := re.match(CHOSEN_BY_USERS + r"\.([^.]+)", spelled):
        start, end = name.span(2)  # span of the key that keeps its hyphens
        spelled = spelled[:start] + option[start:end] + spelled[end:]
    return f"--{'from_' if spelled == 'from' else spelled}{equals}{value}"


def with_hyphens(text: str) -> str:
    """Replace underscores in the option names of a text by hyphens."""
    return re.sub(r"--[a-z][\w.]*", lambda match: match[0].rstrip("_").replace("_", "-"), text)


def _hint_at(hints: dict[str, Any], path: Sequence[str]) -> Any:
    """Return the type of a setting, such as `content.fusion.name`; None if there is none."""
    hint = hints.get(path[0])
    for key in path[1:]:
        if get_origin(hint) is dict:
            hint = get_args(hint)[1]
            continue
        kind = dataclass_in(hint)
        hint = get_type_hints(kind, include_extras=True).get(key) if kind else None
    return hint


def _allows(kind: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType, Annotated):
        return any(_allows(kind, inner_hint) for inner_hint in get_args(hint))
    return hint is kind or (kind is NoneType and hint in (Any, None))


def option_groups(tokens: Sequence[str]) -> list[list[str]]:
    """Split a command line into groups that each start with an option."""
    groups: list[list[str]] = []
    for token in tokens:
        if token.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(token)
    return groups


def config_first(groups: list[list[str]]) -> list[list[str]]:
    """Return the options sorted so that `--config` comes first and others override it."""
    return sorted(groups, key=lambda group: group[0].partition("=")[0] != "--config")


def settings_of(kind: type, values: Any) -> Any:
    """Build the dataclass `kind` from plain values; a wrong or missing setting is a ValueError."""
    if problem := problem_of_value(kind, values, "", with_required=True):
        raise ValueError(problem)
    parser = Parser(exit_on_error=False)
    parser.add_class_arguments(kind, None)
    namespace = parser.instantiate(parser.parse_object(values))
    return kind(**{item.name: namespace[item.name] for item in fields(kind) if item.init})


def problem_of_keys(
    hints: dict[str, Any],
    values: dict[str, Any],
    name: str,
    with_values: bool = True,
    with_required: bool = False,
) -> str | None:
    """Return an error message on a mapping of settings, None if it is valid.

    `hints` are the types by key. Unknown keys and nulls are errors. `with_values` also reports
    values of another type, and `with_required` nested mappings that lack a required setting.
    """
    for key, value in values.items():
        hint, full = hints.get(str(key).removesuffix("+")), f"{name}.{key}".lstrip(".")
        if not hint:
            return f"{full} is no setting{meant(str(key), hints) or '; remove it'}"
        if problem := problem_of_value(hint, value, full, with_values, with_required):
            return problem
    return None


def problem_of_value(
    hint: Any, value: Any, name: str, with_values: bool = True, with_required: bool = False
) -> str | None:
    """Return an error message on the value of a setting, as `problem_of_keys` does."""
    kind = dataclass_in(hint)
    if hint is not str and isinstance(value, str):
        try:
            # A file's name stands for its content only where a mapping of settings is expected.
            is_file = kind is not None and os.path.isfile(value)
            inside = load_plain_yaml(Path(value).read_bytes() if is_file else value.encode())
        except RefusedYaml as error:
            return f"{name}: {short(value)}: {error}"
        except (yaml.YAMLError, UnicodeDecodeError):
            inside = value
        is_inside = inside is None or (kind is not None and isinstance(inside, dict))
        value = inside if is_inside else value
    if value is None and not _allows(NoneType, hint):
        return f"{name} is empty; it must be {described_type(hint)}, or be left out"
    if kind is not None and isinstance(value, dict):
        hints, settings = get_type_hints(kind, include_extras=True), fields(kind)
        if get_origin(hint) is dict:  # one type for settings of any name
            hints, settings = dict.fromkeys(map(str, value), kind), ()
        if problem := problem_of_keys(hints, value, name, with_values, with_required):
            return problem
        for setting in settings if with_required else ():
            if setting.name not in value and setting.default is setting.default_factory is MISSING:
                return f"{name or 'it'} has no {setting.name}; add it"
        return None
    if not with_values:
        return None
    is_right = hint is not kind and (is_plainly_of(hint, value) or is_parsed_as(hint, value))
    return None if is_right else f"{name} is {short(value)}; it must be {described_type(hint)}"


def is_plainly_of(hint: Any, value: Any) -> bool:
    """Return whether a value is of a simple type, a fast check before the slow `is_parsed_as`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(is_plainly_of(item, value) for item in arguments)
    if origin is Literal:
        return type(value) is str and value in arguments
    if origin is list:
        return type(value) is list and all(is_plainly_of(arguments[0], item) for item in value)
    return hint in (bool, int, float, str, NoneType) and type(value) is hint


def is_parsed_as(hint: Any, value: Any) -> bool:
    """Return whether the parser accepts a value for a type."""
    parser = ArgumentParser(exit_on_error=False, parser_mode=MODE)
    parser.add_argument("--value", type=hint)
    try:
        parser.parse_object({"value": value})
    except Exception:  # types of settings may raise any error
        return False
    return True


def meant(name: str, names: Iterable[str]) -> str:
    """Return a question that suggests a similar name; empty if none is similar."""
    return "".join(f"; did you mean {near}?" for near in get_close_matches(name, list(names), n=1))


def described_type(hint: Any) -> str:
    """Describe the allowed values of a type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else str(args[0])
    if origin is Annotated:
        return described_type(args[0])
    if origin in (Union, UnionType):
        return " or ".join(map(described_type, args))
    if is_dataclass(hint):
        return "a mapping of settings"
    return TEXTS.get(origin or hint, str(hint))


def short(value: Any) -> str:
    """Return a value as text for a message."""
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def dataclass_in(hint: Any) -> type | None:
    """Return the dataclass that a type is, or that a union, list or dict type contains, or None."""
    if isinstance(hint, type) and is_dataclass(hint):
        return hint
    return next((kind for argument in get_args(hint) if (kind := dataclass_in(argument))), None)
