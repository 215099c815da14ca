"""A safe YAML loader for schemas and configurations from untrusted people.

It refuses duplicate keys, `class_path`, which imports modules, and aliases, which can expand.
"""

import copy
import math
import re
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import yaml
from jsonargparse import get_loader, set_loader

TEXT = "tag:yaml.org,2002:str"
LARGEST = 4 * 2**20  # bytes of a text; a larger one would be parsed for many seconds
RECIPES = Path(__file__).parents[1] / "recipes"
MODE = "plain_yaml"  # name of the parser mode that reads values with `_load_value`


class RefusedYaml(yaml.YAMLError, TypeError):
    """Raised for YAML that is more than data; as a TypeError, jsonargparse adds the setting."""


def load_plain_yaml(text: bytes) -> Any:
    """Read lists, mappings, text and numbers, of 4 MiB at most; else raise a yaml.YAMLError."""
    if len(text) > LARGEST:
        raise RefusedYaml(f"{len(text):,} bytes of YAML; write at most {LARGEST:,}")
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError as error:
        raise RefusedYaml("nested too deeply; write it flatter") from error


def _load_value(text: str) -> Any:
    """Check that a value is plain, then read it as jsonargparse does.

    A value such as `#` or `~` stays text: a recipe has it in quotes, which are gone here.
    """
    _require_plain(text)
    value = get_loader("yaml")(text)
    if value is None and text.strip() not in ("", "null"):
        return text
    # jsonargparse writes a nested setting as Python does, and reads it again.
    return None if value == "None" else _Mapping(value) if isinstance(value, dict) else value


class _Mapping(dict[str, Any]):
    """A mapping whose text is YAML."""

    __slots__ = ()  # jsonargparse would copy an object's `__dict__` in place of the mapping

    def __str__(self) -> str:
        text: str = yaml.safe_dump(dict(self), default_flow_style=True, width=math.inf)
        return text


@lru_cache(maxsize=1024)  # the parser checks the same defaults and values several times
def _require_plain(text: str) -> None:
    try:
        yaml.compose(text, _PlainLoader)
    except RecursionError as error:
        raise RefusedYaml("nested too deeply; write it flatter") from error


# Text that is not YAML stays text; refused YAML is an error.
set_loader(MODE, _load_value, (yaml.MarkedYAMLError, yaml.reader.ReaderError))


class _PlainLoader(yaml.SafeLoader):
    """Loader that refuses aliases, class paths, and keys that are duplicate or not text."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            where = f"line {alias.start_mark.line + 1}: alias *{alias.anchor}"
            raise RefusedYaml(f"{where} is refused; write its content instead")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a class path, a duplicate key, or a key that is not text, such as `no`."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise RefusedYaml(f"line {line}: a key that is no text; write a name")
            name = (key.tag, key.value)
            if key.tag != TEXT and not key.value:  # such as the text `?`, which may be a value
                raise yaml.MarkedYAMLError(problem="a key is missing", problem_mark=key.start_mark)
            where, value = f"line {line}: key", key.value
            if key.tag != TEXT:
                kind = key.tag.rsplit(":", 1)[-1]
                raise RefusedYaml(
                    f"{where} {value} is read as {kind}; write it in quotes: '{value}'"
                )
            if value == "class_path":
                raise RefusedYaml(f"{where} '{value}' names code, which is never loaded; remove it")
            if name in lines:
                problem = f"key '{value}' is twice, in lines {lines[name]} and {line}"
                raise RefusedYaml(f"{problem}; remove one")
            lines[name] = line
        return node


def recipe_file(path: str | Path) -> Path:
    """Return a path, or the installed recipe for `tiny` or `recsys/recipes/tiny.yaml`."""
    name = str(path).removeprefix("recsys/recipes/").removesuffix(".yaml")
    installed = RECIPES / f"{name}.yaml"
    is_short = str(path) == name or str(path).startswith("recsys/")
    is_name = is_short and re.fullmatch(r"[\w/]+", name)
    return installed if is_name and not Path(path).exists() and installed.exists() else Path(path)


P = ParamSpec("P")
T = TypeVar("T")
NUM_RESULTS = 8  # results that `cached_copy` keeps for a function


def cached_copy(parse: Callable[P, T]) -> Callable[P, T]:
    """Cache the last results of a function of plain values; each call returns a deep copy."""
    results: dict[str, T] = {}

    @wraps(parse)
    def wrapped(*arguments: P.args, **keywords: P.kwargs) -> T:
        key = repr((arguments, keywords))  # distinguishes 1 from "1" and from true
        if key not in results:
            result = parse(*arguments, **keywords)
            if len(results) >= NUM_RESULTS:
                del results[next(iter(results))]
            results[key] = result
        return copy.deepcopy(results[key])

    return wrapped
