"""Writes the snapshot of the public interface: `python -m tests.recsys.public_interface`.

A line per name: what recsys/README.md calls stable, with the names of arguments and fields.
"""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from recsys.commands import COMMANDS

PAGE = Path(__file__).with_name("public_interface.txt")
ROOT = Path(__file__).parents[2]
PACKAGES = (
    *("recsys", "embeddings", "recsys.plug_in", "recsys.serving"),
    "recsys.serving.retrieval",
)
PATHS = (
    "recsys.model.auxiliary:AuxiliaryInputs",
    "recsys.data.row_source:Chunk",
    "recsys.data.row_source:RowSource",
    "recsys.evaluation.further_metrics:Metric",
    "recsys.training.callbacks:Callback",
    "recsys.training.trackers:Tracker",
    "recsys.ranking.vectors:IDVectors",
    "recsys.content.vectors:ContentVectors",
)
SCHEMA = ("Column", "VocabularySettings", "ItemColumn", "Items", "FeatureTable")
FORMATS = ("checkpoint.files", "checkpoint.partitions", "serving.package", "serving.delta")


def parameters(function: Any) -> str:
    names = inspect.signature(function).parameters
    return f"({', '.join(name for name in names if name != 'self')})"


def members(obj: Any) -> Iterator[str]:
    """Arguments of a function or class, and public methods and properties of a class."""
    if not getattr(obj, "_is_protocol", False):
        message = getattr(obj, "__deprecated__", None)
        yield parameters(obj) + (f" deprecated: {message}" if message else "")
    if inspect.isclass(obj):
        for name, member in sorted(vars(obj).items()):
            is_method = inspect.isfunction(member) or isinstance(member, classmethod | staticmethod)
            if is_method and (name == "__call__" or not name.startswith("_")):
                yield f".{name}{parameters(getattr(obj, name))}"
            elif isinstance(member, property) and not name.startswith("_"):
                yield f".{name}"


def loaded(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def command(path: str) -> Any:
    return loaded(path if "." in path.partition(":")[0] else f"recsys.commands.{path}")


def homes() -> set[str]:
    """Modules in which the public names, parts and commands are defined."""
    names = [f"{package}:{name}" for package in PACKAGES for name in import_module(package).__all__]
    objects = [loaded(path) for path in (*names, *PATHS)]
    objects += [loaded(f"recsys.data.schema_columns:{name}") for name in SCHEMA]
    objects += [command(path) for path, _ in COMMANDS.values()]
    return {*PACKAGES, *(obj.__module__ for obj in objects)}


def interface() -> str:
    lines = []
    for package in PACKAGES:
        for name in sorted(import_module(package).__all__):
            lines += [
                f"name {package}.{name}{text}" for text in members(loaded(f"{package}:{name}"))
            ]
    for path in PATHS:
        lines += [f"part {path}{text}" for text in members(loaded(path))]
    for name, (path, _) in COMMANDS.items():
        lines.append(f"command recsys {name} {parameters(command(path))}")
    lines += [
        f"schema {name}{parameters(loaded(f'recsys.data.schema_columns:{name}'))}"
        for name in SCHEMA
    ]
    for name in FORMATS:
        lines.append(f"format {name} {loaded(f'recsys.{name}:FORMAT')}")
    server = (ROOT / "recsys" / "serving" / "server" / "http_app.py").read_text()
    lines += [f"route {route}" for route in sorted(set(re.findall(r'"(/v\d[^"]*)"', server)))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(interface())
