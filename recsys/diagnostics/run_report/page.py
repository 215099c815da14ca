"""Write a page of sections as one self-contained HTML file, with figures as data URIs."""

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

from recsys.evaluation.metrics import metric_cell

BLUE, ORANGE, GREY = "#2a6f97", "#d9722e", "#8a8f98"
_DRAWING: dict[Any, Any] = {  # matplotlib settings; Any, as matplotlib's type of names is strict
    "font.size": 11,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "grid.color": "#e4e6ea",
}


@dataclass(frozen=True)
class Drawing:
    """A figure of the page."""

    name: str  # id of its HTML element
    svg: bytes
    caption: str


@dataclass(frozen=True)
class Table:
    """A table: `rows` below `head`. The first column holds names, other columns numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    """A section: title, paragraphs, figures, tables and plain text, in this order."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    text: str = ""
    verdicts: list[str] = field(default_factory=list)  # the page starts with those of all sections


def new_figure(num_plots: int) -> tuple[Figure, list[matplotlib.axes.Axes]]:
    """Return a figure and its plots side by side, readable on a page 1,280 pixels wide."""
    with matplotlib.rc_context(_DRAWING):
        figure = Figure(figsize=(11, 4), layout="constrained")
        axes = figure.subplots(1, num_plots, squeeze=False)[0]
    return figure, list(axes)


def drawn(name: str, figure: Figure, caption: str) -> Drawing:
    """Return the figure as SVG; equal figures give equal bytes."""
    output = io.BytesIO()
    metadata: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text stays text, because browsers have glyphs of all languages, unlike matplotlib's font.
    style: Any = {"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 11}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasSVG(figure).print_svg(output, metadata=metadata)
    return Drawing(name, output.getvalue(), caption)


def metrics_table(title: str, names: dict[str, str], by_subset: dict[str, dict[str, Any]]) -> Table:
    """Return a table with a row of metrics per subset; `names` maps metrics to column headings."""
    rows = []
    for subset, values in by_subset.items():
        cells = (metric_cell(values, name, "–") for name in names)
        rows.append((subset, *cells, f"{values['num_samples']:,}"))
    return Table((title, *names.values(), "rows"), rows)


def html_page(title: str, sections: Sequence[Section]) -> str:
    """Return the page as HTML; all text is escaped."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    pages.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return pages.get_template("page.html.j2").render(title=title, sections=sections)
