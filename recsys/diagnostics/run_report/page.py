"""A page of sections as one HTML file: figures are inside it, and nothing is fetched.

A figure is drawn by matplotlib as SVG and embedded as a data URI, so that the ids of one drawing
do not meet those of another.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import matplotlib
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
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2129; max-width: 1120px;
       margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.8rem; margin-bottom: 0 }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid #d8dbe0 }
p { max-width: 75ch }
figure { margin: 1rem 0 }
figure img { width: 100%; height: auto }
figcaption { color: #5a606b; font-size: .9rem; max-width: 85ch }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #e4e6ea }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
.cards { display: grid; grid-template-columns: 160px 1fr; gap: 1rem; margin: 1.5rem 0;
         padding-top: 1rem; border-top: 1px solid #e4e6ea }
.cards p { margin: 0 0 .3rem; color: #5a606b; font-size: .9rem }
.row { display: grid; grid-template-columns: repeat(5, 1fr); gap: .7rem; margin-bottom: .8rem }
.card { font-size: .85rem; line-height: 1.3; overflow-wrap: anywhere }
.card img, .card .blank { height: 96px; display: block; margin-bottom: .3rem; border-radius: 3px }
.card img { max-width: 100%; object-fit: contain }
.card .blank { width: 64px; background: #eef0f3 }
.card small { display: block; color: #5a606b }
pre { background: #f5f6f8; padding: 1rem; overflow-x: auto; font-size: .85rem }
"""


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
    """Plots side by side, wide enough to be read on a page 1,280 pixels wide."""
    with matplotlib.rc_context(_DRAWING):
        figure = Figure(figsize=(11, 4), layout="constrained")
        axes = figure.subplots(1, num_plots, squeeze=False)[0]
    return figure, list(axes)


def drawn(name: str, figure: Figure, caption: str) -> Drawing:
    """The figure as SVG, the same for the same figure."""
    output = io.BytesIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text stays text: the browser has letters of all languages, matplotlib's font has not.
    style: Any = {"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 11}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasSVG(figure).print_svg(output, metadata=nothing)
    return Drawing(name, output.getvalue(), caption)


def number(value: float | None, decimals: int = 4) -> str:
    """As in tables; what is not defined is a dash."""
    return "–" if value is None else f"{value:,.{decimals}f}"


def html_page(title: str, sections: Sequence[Section]) -> str:
    """The whole page. Every text is escaped."""
    body = "\n".join(_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(words)}</p>" for words in section.words]
    parts += [_figure(drawing) for drawing in section.drawings]
    parts += [_table(table) for table in section.tables]
    parts += [_cards(cards) for cards in section.cards]
    if section.text:
        parts.append(f"<pre>{escape(section.text)}</pre>")
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _figure(drawing: Drawing) -> str:
    data = base64.b64encode(drawing.svg).decode()
    caption = escape(drawing.caption)
    return (
        f'<figure id="{escape(drawing.name)}">'
        f'<img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in table.rows
    )
    return f"<table>\n<tr>{head}</tr>\n{rows}</table>"


def _cards(cards: Cards) -> str:
    rows = "\n".join(
        f'<p>{escape(words)}</p>\n<div class="row">{"".join(map(_card, row))}</div>'
        for words, row in cards.rows
    )
    return f'<div class="cards">{_card(cards.first)}<div>\n{rows}</div></div>'


def _card(card: Card) -> str:
    picture = "" if card.picture is None else '<span class="blank"></span>'
    if card.picture:
        data = base64.b64encode(card.picture).decode()
        picture = f'<img alt="{escape(card.title)}" src="data:image/jpeg;base64,{data}">'
    lines = "".join(f"<small>{escape(line)}</small>" for line in card.lines)
    return f'<div class="card">{picture}<strong>{escape(card.title)}</strong>{lines}</div>'
