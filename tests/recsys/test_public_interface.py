"""The interface that recsys/README.md calls stable equals its snapshot, and the page names it."""

from __future__ import annotations

import re

import recsys
from tests.recsys.public_interface import PACKAGES, PAGE, PARTS, ROOT, interface

TEXT = (ROOT / "recsys" / "README.md").read_text()


def test_the_public_interface_equals_its_snapshot() -> None:
    """A change that is meant: `python -m tests.recsys.public_interface`, and the changelog."""
    now, before = (set(text.splitlines()) for text in (interface(), PAGE.read_text()))
    assert {"gone": sorted(before - now), "new": sorted(now - before)} == {"gone": [], "new": []}


def test_the_page_names_every_stable_package_and_interface() -> None:
    named = set(re.findall(r"`([\w.]+)`", TEXT))
    assert {*PACKAGES} <= named
    assert {path.partition(":")[2] for path in PARTS} <= named


def test_the_reference_of_the_site_has_every_public_name() -> None:
    text = (ROOT / "launch" / "docs" / "api.md").read_text()
    listed = set(re.findall(r"auto(?:class|module):: ([\w.]+)", text))
    names = {f"recsys.{name}" for name in recsys.__all__}  # loaded on use, unseen by automodule
    assert {*PACKAGES, *names} | {path.replace(":", ".") for path in PARTS} == listed
