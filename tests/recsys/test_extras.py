"""Extras: the error of a command that lacks one, and what the pages say of them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from recsys import extras
from recsys.extras import missing_extra

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SOURCES = [
    path
    for folder in ("recsys", "launch", "benchmarks", "embeddings")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".md", ".py", ".yaml", "") and path.is_file()
]
TEXTS = {path: path.read_text() for path in [ROOT / "README.md", *SOURCES]}


@pytest.mark.parametrize("name", EXTRAS)
def test_an_extra_that_is_missing_is_named_by_its_packages_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f'{line}; extra == "{extra}"' for extra in EXTRAS for line in EXTRAS[extra]]
    monkeypatch.setattr(extras, "requires", lambda _: ["fbgemm-gpu==1.8.*", *lines])

    error = str(missing_extra(name, "recsys COMMAND", "no module"))

    packages = " ".join(f"'{line}'" for line in EXTRAS[name])
    assert f"pip install {packages}, or in the sources" in error
    assert f"launch/install.py --extra {name}" in error and "fbgemm" not in error


def test_no_text_installs_an_extra_by_pip_where_that_breaks_fbgemm() -> None:
    """`pip install recsys-em3[NAME]` is said to work on machines with CUDA alone."""
    advised = {
        path.relative_to(ROOT): line
        for path, text in TEXTS.items()
        for line in text.split("\n\n")
        if re.search(r"recsys-em3\[|-e \.\[", line) and "CUDA" not in line
    }
    assert advised == {}


def test_the_page_of_extras_has_those_of_the_project() -> None:
    rows = re.findall(r"^\| (`.*?) \| .* \|$", TEXTS[ROOT / "launch" / "README.md"], re.MULTILINE)
    section = [re.findall(r"`([a-z]+)`", row) for row in rows]
    listed = [name for row in section for name in row if row and {*row} <= EXTRAS.keys()]
    assert sorted(listed) == sorted(EXTRAS)
