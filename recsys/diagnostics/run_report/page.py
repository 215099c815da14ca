"""Writes a page of sections as one HTML file: figures are inside it, and nothing is fetched.

A figure is drawn by matplotlib as SVG and embedded as a data URI, so that the ids of one drawing
do not meet those of another.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2a6f97", "#d9722e", "#8a8f98"
_DRAWING: dict[Any, Any] = {  # of matplotlib, which types its names
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_TEMPLATE = "page.html.j2"  # beside this file


@dataclass(frozen=True)
class Drawing:
    """A figure of the page: its name (the id of its element), SVG and what it shows in words."""

    name: str
    svg: bytes
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of cells below a head; the first column is of names, the others of numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Card:
    """One item: its name, lines on it, and its picture as JPEG.

    Without bytes in it (`b""`) the picture is a grey field; where it is None there is no field.
    """

    title: str
    lines: Sequence[str] = ()
    picture: bytes | None = None


@dataclass(frozen=True)
class Cards:
    """An item and, beside it, rows of at most five others, each row below a line of words."""

    first: Card
    rows: Sequence[tuple[str, Sequence[Card]]]


@dataclass
class Section:
    """A title, paragraphs, and below them figures, tables, cards and plain text, in this order."""

    title: str
    words: list[str] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    text: str = ""
    cards: list[Cards] = field(default_factory=list)


def new_figure(num_plots: int) -> tuple[Figure, list[matplotlib.axes.Axes]]:
    """Return plots side by side, wide enough to be read on a page 1,280 pixels wide."""
    with matplotlib.rc_context(_DRAWING):
        figure = Figure(figsize=(11, 4), layout="constrained")
        axes = figure.subplots(1, num_plots, squeeze=False)[0]
    return figure, list(axes)


def drawn(name: str, figure: Figure, caption: str) -> Drawing:
    """Return the figure as SVG, the same for the same figure."""
    output = io.BytesIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text stays text: the browser has letters of all languages, matplotlib's font has not.
    style: Any = {"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 11}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasSVG(figure).print_svg(output, metadata=nothing)
    return Drawing(name, output.getvalue(), caption)


def number(value: float | None, decimals: int = 4) -> str:
    """Return a number as in tables; what is not defined is a dash."""
    return "–" if value is None else f"{value:,.{decimals}f}"


def html_page(title: str, sections: Sequence[Section]) -> str:
    """Return the whole page. Every text is escaped."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    pages.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return pages.get_template(_TEMPLATE).render(title=title, sections=sections)
