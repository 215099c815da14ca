"""The figures of the quality study, of results as `benchmarks.quality.study` reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.study import EFFECTS, CellResult, Effect
from recsys.diagnostics.run_report.item_popularity import BUCKETS, doubling_edges
from recsys.diagnostics.run_report.learning_curves import read_curves, selection_curve
from recsys.diagnostics.run_report.page import BLUE, GREY, Drawing, drawn, new_figure
from recsys.evaluation.model_selection import selection_words

# Okabe and Ito's colours, which differ for colour-blind eyes too; yellow is too pale for lines.
PALETTE = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#0072b2")
MARKERS = "osD^vPX"
MOST_CELLS = len(PALETTE)
Style = tuple[str, str]  # colour and marker


def styles(results: Sequence[CellResult]) -> list[Style]:
    """Return one style per cell, the same in all figures; at most `MOST_CELLS`."""
    return list(zip(PALETTE, MARKERS, strict=True))[: len(results)]


def effect_bars(effects: Sequence[Effect]) -> Drawing:
    """Draw a bar with its interval per effect, the columns of `EFFECTS` side by side."""
    figure, plots = new_figure(len(EFFECTS))
    figure.set_size_inches(11, 1.5 + 0.42 * len(effects))
    names = [f"{effect.cell.name}\nagainst {effect.cell.baseline}" for effect in effects]
    for axes, column in zip(plots, EFFECTS, strict=True):
        for place, effect in enumerate(effects):
            _effect_bar(axes, place, effect, column)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_ylim(len(effects) - 0.4, -0.6)
        axes.set_yticks(range(len(effects)), names, fontsize=8)
        axes.tick_params(labelleft=axes is plots[0])
        axes.set(title=column, xlabel="difference to the baseline")
        axes.locator_params(axis="x", nbins=4)
    caption = (
        "Effect of each part on the test split: the cell's metric minus its baseline's, with a "
        "95 % interval. Blue: the interval excludes 0, so the effect counts; grey: it does not."
    )
    return drawn("effects", figure, caption)


def _effect_bar(axes: Axes, place: int, effect: Effect, column: str) -> None:
    interval = effect.intervals[column]
    if interval is None:
        axes.text(0, place, " not defined", va="center", fontsize=8)
        return
    sides = [[interval.value - interval.low], [interval.high - interval.value]]
    colour = BLUE if interval.excludes_zero else GREY
    errors = np.maximum(sides, 0)
    axes.barh(place, interval.value, 0.6, xerr=errors, color=colour, capsize=3, ecolor="#1d2129")


def learning_curves(results: Sequence[CellResult]) -> Drawing:
    """Draw the metric that chose the models by step, of the median seed on the last dataset."""
    figure, (axes,) = new_figure(1)
    for result, (colour, marker) in zip(results, styles(results), strict=True):
        run = result.runs[result.median_seed()][-1]
        curve = selection_curve(read_curves(run.folder), result.best_model_by)
        if curve[0]:
            axes.plot(*curve, color=colour, marker=marker, label=result.cell.name)
    chosen_by = selection_words(results[0].best_model_by)
    axes.set(xlabel="step", ylabel=f"{chosen_by}, validation")
    _legend(figure)
    caption = (
        f"The {chosen_by} of validation by training step, of the seed whose validation AUC is the "
        "median; of several windows, the last. The highest point of a curve is the model that is "
        "tested."
    )
    return drawn("learning-curves", figure, caption)


def popularity_bars(results: Sequence[CellResult]) -> Drawing:
    """Draw GAUC by the number of training impressions of the row's item."""
    figure, (axes,) = new_figure(1)
    width = 0.84 / len(results)
    for index, (result, (colour, _)) in enumerate(zip(results, styles(results), strict=True)):
        values = result.by_count("gauc", BUCKETS)
        heights = [np.nan if value is None else value - 0.5 for value in values.values()]
        places = np.arange(len(values)) + (index - (len(results) - 1) / 2) * width
        axes.bar(places, heights, width, bottom=0.5, color=colour, label=result.cell.name)
        axes.set_xticks(range(len(values)), list(values))
    axes.axhline(0.5, color="black", linewidth=1)
    axes.set(xlabel="training impressions of the item", ylabel="GAUC")
    _legend(figure)
    caption = (
        "GAUC of the test split by the item's training impressions, median over seeds. Bars begin "
        "at 0.5, which is chance; one is missing where no user has both labels."
    )
    return drawn("popularity", figure, caption)


def cold_start_curves(results: Sequence[CellResult]) -> Drawing:
    """Draw AUC by training impressions of the row's item, in ranges that double."""
    figure, (axes,) = new_figure(1)
    edges = doubling_edges(results[0].most_impressions)
    for result, (colour, marker) in zip(results, styles(results), strict=True):
        values = result.by_count("auc", edges)
        heights = [np.nan if value is None else value for value in values.values()]
        axes.plot(heights, color=colour, marker=marker, label=result.cell.name)
        axes.set_xticks(range(len(values)), list(values))
    axes.axhline(0.5, color="black", linewidth=1)
    axes.set(xlabel="training impressions of the item", ylabel="AUC")
    _legend(figure)
    caption = (
        "Cold start: AUC of the test split by the item's training impressions, each range twice as "
        "wide as the one before, median over seeds. The line at 0.5 is chance."
    )
    return drawn("cold-start", figure, caption)


def _legend(figure: Figure) -> None:
    """Put the legend above the plot, where no line passes."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.set_size_inches(11, 5)
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
