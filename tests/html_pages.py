"""HTML pages as tests read them: parsed, and shown by a browser."""

from __future__ import annotations

import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

from tests.ranks import HANG_SECONDS


class Page(HTMLParser):
    """What a browser would show and fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[str | None] = []
        self.titles: list[str] = []
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        attributes = dict(attrs)
        if tag == "figure":
            self.figures.append(attributes["id"])
        self.addresses += [attributes[name] or "" for name in ("src", "href") if name in attributes]

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h2"]:
            self.titles.append(data)
        if self.open[-1:] == ["td"]:
            self.cells.append(data)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass


def browser_dom(page: Path) -> str:
    """Returns the document that chromium has of a page once its scripts have run."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"]
    with tempfile.TemporaryDirectory() as profile:
        process = subprocess.run(
            ["chromium", *options, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
        )
    assert process.stdout, process.stderr
    return process.stdout
