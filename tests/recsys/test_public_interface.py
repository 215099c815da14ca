"""The interface that recsys/README.md calls stable equals its snapshot, and the page names it."""

import re
import tomllib
from fnmatch import fnmatch
from typing import Any

import pytest

import recsys
from tests.recsys.public_interface import PACKAGES, PAGE, PATHS, ROOT, homes, interface, members

TEXT = (ROOT / "recsys" / "README.md").read_text()


def test_the_public_interface_equals_its_snapshot() -> None:
    """A change that is meant: `python -m tests.recsys.public_interface`, and the changelog."""
    current, stored = (set(text.splitlines()) for text in (interface(), PAGE.read_text()))
    assert {"gone": sorted(stored - current), "new": sorted(current - stored)} == {
        "gone": [],
        "new": [],
    }


def test_the_page_names_every_stable_package_and_interface() -> None:
    page_names = set(re.findall(r"`([\w.]+)`", TEXT))
    assert {*PACKAGES} <= page_names
    assert {path.partition(":")[2] for path in PATHS} <= page_names


def test_the_reference_of_the_site_has_every_public_name() -> None:
    text = (ROOT / "launch" / "docs" / "api.md").read_text()
    listed = set(re.findall(r"auto(?:class|module):: ([\w.]+)", text))
    names = {f"recsys.{name}" for name in recsys.__all__}  # loaded on use, unseen by automodule
    assert {*PACKAGES, *names} | {path.replace(":", ".") for path in PATHS} == listed


def test_every_module_of_a_public_name_is_checked_by_mypy_strict() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["strict"]
    (strict,) = (o["module"] for o in settings["overrides"] if o.get("warn_return_any"))
    patterns = [name if name.endswith("*") else f"{name}." for name in strict]
    modules = homes()
    assert len(modules) > 30
    checked = {name for name in modules for pattern in patterns if fnmatch(f"{name}.", pattern)}
    assert modules - checked == set()


def test_a_name_that_goes_warns_and_stands_so_in_the_snapshot() -> None:
    (example,) = re.findall(r"```python\n(from typing_extensions.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    with pytest.warns(FutureWarning, match="goes in 0.3"):
        names["build_model"]()
    assert [*members(names["build_model"])] == ["() deprecated: use recsys.EM3; goes in 0.3"]
