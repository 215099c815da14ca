"""Write the reference of all settings, SETTINGS.md, from the dataclasses of this folder.

With `--check` it only compares, and exits with status 1 if the page differs from the code.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser

from recsys.config.parser import dataclass_in
from recsys.config.ranking import RANKING_MODELS, RankingSettings, settings_class
from recsys.config.run import Config

PAGE = Path(__file__).with_name("SETTINGS.md")
HEAD = """# Settings

Every setting with its type, default and meaning, as `recsys train --help` prints them. This page is
generated from the docstrings of `recsys/config`: change them and run
`python -m recsys.config.settings_page`. How to set them: [Configure](README.md#configure).
"""


def settings_page() -> str:
    """Return the page as Markdown: a list for the run, and for each component and ranking model."""
    sections = [HEAD, *_sections("", Config)]
    base = {entry.name for entry in fields(RankingSettings)}
    for name in RANKING_MODELS:
        additional = [entry for entry in fields(settings_class(name)) if entry.name not in base]
        if additional:
            sections.append(
                f"## ranking, name: {name}\n\n{_list(settings_class(name), additional)}"
            )
    return "\n".join(sections)


def _sections(path: str, settings: type) -> Iterator[str]:
    """Yield the section of a dataclass, then the sections of dataclasses in its fields."""
    hints = get_type_hints(settings)
    inner = {entry.name: dataclass_in(hints[entry.name]) for entry in fields(settings)}
    plain = [entry for entry in fields(settings) if inner[entry.name] is None]
    summary = docstring_parser.parse_from_object(settings).short_description
    yield f"## {path or 'Run'}\n\n{summary}\n\n{_list(settings, plain)}"
    for name, kind in inner.items():
        if kind is not None:
            placeholder = ".NAME" if get_args(hints[name])[:1] == (str,) else ""
            yield from _sections(f"{path}.{name}{placeholder}".removeprefix("."), kind)


def _list(settings: type, rows: list[Field[Any]]) -> str:
    sentences = {
        entry.arg_name: " ".join((entry.description or "").split())
        for base in reversed(settings.__mro__[:-1])
        for entry in docstring_parser.parse_from_object(base).params
        if entry.description
    }
    hints = get_type_hints(settings)
    lines = []
    for row in rows:
        kind = ", ".join(_choices(hints[row.name])) or f"`{row.type}`"
        lines.append(f"- `{row.name}` ({kind}; {_default(row)}): {sentences[row.name]}")
    return "\n".join(lines) + "\n"


def _choices(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [f"`{choice}`" for choice in get_args(hint)]
    flags = ["`true`", "`false`"]
    kinds = get_args(hint)
    return [entry for kind in kinds for entry in (flags if kind is bool else _choices(kind))]


def _default(row: Field[Any]) -> str:
    if row.default is not MISSING:
        return f"default `{row.default}`"
    return "required" if row.default_factory is MISSING else f"default `{row.default_factory()}`"


def main() -> None:
    """Write the page, or compare it with the code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare the page, write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(settings_page())
    elif PAGE.read_text() != settings_page():
        sys.exit(f"{PAGE} differs from the docstrings: run python -m recsys.config.settings_page")


if __name__ == "__main__":
    main()
