"""Reads an `events.yaml`."""

from __future__ import annotations

import os
from dataclasses import fields
from datetime import date
from pathlib import Path, PurePosixPath
from typing import Any

from jsonargparse import ArgumentParser

from recsys.config.parser import problem_of
from recsys.config.plain_yaml import load_plain_yaml, recipe_file
from recsys.data.events.checks import check_events_config, sources
from recsys.data.events.settings import EventsConfig, ItemTable, Source
from recsys.data.filesystem import home_expanded

# Where a word may stand for a mapping of one key, and where for a list.
SHORT = {
    **{f"/{table}/*": "kind" for table in ("context", "items/columns", "users/columns")},
    "/items/content/*": "kind",
    "/histories/*/parallel/*": "column",
}
LISTS = (
    *("/rows", "/labels/*/action", "/histories/*/actions"),
    *("/counts/*/of", "/counts/*/actions", "/counts/*/per"),
)


def load_events_config(path: Path, data: Path | None = None) -> EventsConfig:
    """Read an events.yaml; relative paths in it are in the folder `data`, by default its own.

    Raises:
        ValueError: the file is missing, has an unknown key, or its parts do not fit together.
    """
    path = recipe_file(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name an events.yaml")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(EventsConfig, None)
    try:
        content = load_plain_yaml(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it must be a mapping with events and labels")
        content = _written_out(content)
        if problem := problem_of(EventsConfig, content):
            raise ValueError(problem)
        namespace = parser.instantiate(parser.parse_object(content))
        config = EventsConfig(**{part.name: namespace[part.name] for part in fields(EventsConfig)})
        for _, source in sources(config):
            _resolve(source, path.parent if data is None else data)
        if config.items is not None:
            _resolve_pictures(config.items, path.parent if data is None else data)
        check_events_config(config)
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def _written_out(content: Any, path: tuple[str, ...] = ()) -> Any:
    """Return YAML with words written out where mappings or lists are expected, dates as texts."""
    if isinstance(content, date):  # as YAML reads them without quotes
        return content.isoformat()
    if isinstance(content, dict):
        content = {
            name: _written_out(part, (*path, str(name).replace("/", "_") or "_"))
            for name, part in content.items()
        }
    here = PurePosixPath("/", *path)
    if isinstance(content, int | str | list) and any(map(here.match, LISTS)):
        return [_text(part) for part in (content if isinstance(content, list) else [content])]
    if isinstance(content, list):
        return [_written_out(part, path) for part in content]
    if isinstance(content, str):
        return next(({key: content} for place, key in SHORT.items() if here.match(place)), content)
    return content


def _text(action: Any) -> Any:
    """Return an action that YAML reads as a number or a truth value as logs have it."""
    if isinstance(action, bool):
        return str(action).lower()
    return str(action) if isinstance(action, int) else action


def _resolve(source: Source, folder: Path) -> None:
    """Make relative paths absolute, in place."""
    paths = [source.path] if isinstance(source.path, str) else source.path
    source.path = [
        path if "://" in path else os.path.realpath(folder / home_expanded(path)) for path in paths
    ]


def _resolve_pictures(items: ItemTable, folder: Path) -> None:
    """Make folders of pictures absolute, in place; refuse them for other content than images."""
    for name, content in items.content.items():
        if content.path_column is None:
            if content.folder is not None:
                raise ValueError(f"items.content.{name}: folder without path_column; set both")
            continue
        if content.kind != "image":
            raise ValueError(
                f"items.content.{name}: path_column is of kind image, not {content.kind}; remove it"
            )
        if "://" not in (content.folder or ""):
            content.folder = os.path.realpath(folder / (content.folder or ""))
