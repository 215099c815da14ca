"""Colours the points of a map: by training impressions, or by category with a legend.

Shapes: I items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito, Color Universal Design, 2008: distinguishable for people with any colour vision.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#000000")
OTHER = "#c9ccd1"

# Of a figure, its plots and the points [I, 2] of each.
Paint = Callable[[Figure, list[Axes], list[np.ndarray]], None]


@dataclass(frozen=True)
class Categories:
    """The category of each item, from one of the items' columns; None if an item has none."""

    column: str
    values: Sequence[str | None]  # [I]


def by_count(counts: np.ndarray) -> Paint:  # counts: int64 [I], above 0
    """Return a function that colours points by training impressions."""
    logarithms = np.log10(counts)

    def paint(figure: Figure, places: list[Axes], planes: list[np.ndarray]) -> None:
        for axes, plane in zip(places, planes):
            points = axes.scatter(plane[:, 0], plane[:, 1], c=logarithms, s=12, cmap="viridis")
        figure.colorbar(points, ax=places, label="log10 of training impressions")

    return paint


def by_category(categories: Categories) -> Paint:
    """Return a function that colours the most frequent categories by `PALETTE`, others grey."""
    known = Counter(value for value in categories.values if value is not None)
    frequent = [value for value, _ in known.most_common(len(PALETTE))]
    colours = dict(zip(frequent, PALETTE))
    of_items = np.array([colours.get(value or "", OTHER) for value in categories.values])
    groups = list(zip(frequent, PALETTE))
    if (of_items == OTHER).any():
        groups.append(("other", OTHER))

    def paint(figure: Figure, places: list[Axes], planes: list[np.ndarray]) -> None:
        for axes, plane in zip(places, planes):
            for _, colour in reversed(groups):  # frequent categories are drawn last, on top
                inside = plane[of_items == colour]
                axes.scatter(inside[:, 0], inside[:, 1], color=colour, s=14, linewidths=0)
        _legend(figure, places[0], groups, categories.column)

    return paint


def _legend(figure: Figure, axes: Axes, groups: list[tuple[str, str]], title: str) -> None:
    handles = [axes.scatter([], [], color=colour, s=40) for _, colour in groups]
    legend = figure.legend(handles, [""] * len(groups), loc="outside right center")
    legend.set_title(title)
    # Texts are shown literally: "_" and "$" have no special meaning.
    for text, (name, _) in zip(legend.get_texts(), groups):
        text.set_parse_math(False)
        text.set_text(name if len(name) <= 20 else f"{name[:19]}…")
    legend.get_title().set_parse_math(False)
