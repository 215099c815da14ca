"""Sphinx settings of `make docs`: a site of the folders' pages and a reference of public names."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

project = "recsys-em3"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = [
    *("*.md", ".github/*.md", "recsys/**.md", "launch/**.md", "benchmarks/**.md"),
    "tests/ERRORS.md",
]
# Notes without a title are parts of other pages.
NOTES = (ROOT / "benchmarks" / "results").glob("*_notes.md")
exclude_patterns = [
    ".github/PULL_REQUEST_TEMPLATE.md",
    *(str(path.relative_to(ROOT)) for path in NOTES if not path.read_text().startswith("# ")),
]

html_theme = "furo"
html_title = project
myst_heading_anchors = 4  # links to headings, as the pages have them for the repository's host
autodoc_member_order = "bysource"
napoleon_use_ivar = True
autodoc_preserve_defaults = True
highlight_language = "none"  # blocks without a language show output
html_show_copyright = False
# Of `make links`: addresses of examples, and hosts that turn programs away.
linkcheck_ignore = [r"http://(host|localhost|127\.0\.0\.1)"]
default_role = "code"
suppress_warnings = ["myst.header"]  # a page may begin a section two levels below its title

# Pages of the navigation, by the title of their group; below, those under a page of it.
NAVIGATION = {
    "Learn": ["launch/docs/tutorial", "launch/docs/concepts", "launch/docs/glossary"],
    "Data": ["recsys/data/README", "recsys/data/events/README", "recsys/data/transforms/README"],
    "Model": [
        *("recsys/config/README", "recsys/config/SETTINGS", "recsys/content/README"),
        *("recsys/ranking/README", "recsys/training/README", "recsys/plug_in/README"),
    ],
    "Results": [
        *("recsys/evaluation/README", "recsys/diagnostics/README", "recsys/search/README"),
        *("recsys/checkpoint/README", "benchmarks/README"),
    ],
    "Production": [
        *("recsys/training/continual/README", "recsys/serving/README"),
        *("recsys/serving/server/README", "recsys/serving/retrieval/README", "launch/README"),
        *("launch/gpu/README", "recsys/kernels/README"),
    ],
    "Reference": ["launch/docs/api", "recsys/README", "CHANGELOG", "CONTRIBUTING"],
}
OTHER_PAGES = {
    "benchmarks/README": {"Results": ["benchmarks/results/*"]},
    "CONTRIBUTING": {"Project": [".github/CODE_OF_CONDUCT", ".github/SECURITY", "tests/ERRORS"]},
}


def add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    """Append the navigation, so that the pages of the repository need no directive of the site."""
    groups = NAVIGATION if page == root_doc else OTHER_PAGES.get(page, {})
    for title, pages in groups.items():
        lines = "\n".join(f"/{name}" for name in pages)
        head = f"\n\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {title}"
        source[0] += f"{head}\n\n{lines}\n```\n"


def add_index(app: Sphinx, error: Exception | None) -> None:
    """Give the front page the name that a server of files looks for."""
    if error is None:
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    """Connect the two steps above."""
    app.connect("source-read", add_navigation)
    app.connect("build-finished", add_index)
