"""Results of a study's finished runs: medians over seeds, and effects with their intervals.

Datasets of a folder of windows are pooled: a metric of a seed is that of the rows of all windows
(`recsys.evaluation.bootstrap`). An effect is the difference of a cell to its baseline, with an
interval of the paired bootstrap over users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from benchmarks.quality.cells import Cell
from benchmarks.quality.grid import PEERS, RECIPE
from benchmarks.quality.plan import Plan
from benchmarks.quality.runs import Training
from recsys.config import BestModelBy, load_config
from recsys.diagnostics.run_report.item_popularity import CountRange, count_ranges
from recsys.evaluation.bootstrap import Interval, metric_users, paired_difference, pooled_metric
from recsys.evaluation.scores import SplitScores, read_scores, scores_file

# Columns of a table: metric and part of the items.
COLUMNS = {
    "AUC": ("auc", "all"),
    "GAUC": ("gauc", "all"),
    "GAUC cold": ("gauc", "cold"),
    "GAUC unseen": ("gauc", "unseen"),
}
EFFECTS = ("GAUC", "GAUC cold", "GAUC unseen", "AUC")


@dataclass(frozen=True)
class CellResult:
    """The finished runs of a cell.

    runs, scores: [seeds][datasets].
    """

    cell: Cell
    runs: list[list[Training]]
    scores: list[list[SplitScores]]

    def of_seeds(self, column: str) -> dict[int, float]:
        """Return a column of `COLUMNS` by seed; seeds whose rows do not define it are left out."""
        metric, part = COLUMNS[column]
        seeds = [of_data[0].seed for of_data in self.runs]
        values = [pooled_metric(of_data, metric, part) for of_data in self.scores]
        return {seed: value for seed, value in zip(seeds, values) if value is not None}

    def users(self, column: str) -> int:
        """Return the number of users that define a column of `COLUMNS`."""
        return metric_users(self.scores[0], *COLUMNS[column])

    def median(self, column: str) -> float | None:
        """Return the median of a column over seeds."""
        return median_of_known(list(self.of_seeds(column).values()))

    @property
    def best_model_by(self) -> BestModelBy:
        """Metric that chose the tested models."""
        run = self.runs[0][0]
        return load_config(run.recipe, list(run.overrides)).best_model_by

    @property
    def most_impressions(self) -> int:
        """Training impressions of the most frequent item scored, at least 1."""
        return max(int(scores.counts.max(initial=1)) for scores in self.scores[0])

    def median_seed(self) -> int:
        """Return the index of the seed with the median validation AUC; the lower of two."""
        aucs = [validation_metric(of_data, "auc") or 0.0 for of_data in self.runs]
        order = sorted(range(len(aucs)), key=lambda seed: aucs[seed])
        return order[(len(order) - 1) // 2]

    def by_count(self, metric: str, edges: Sequence[int]) -> dict[str, float | None]:
        """Return a metric's median over seeds by the training impressions of the row's item.

        Args:
            metric: `auc` or `gauc`.
            edges: the least count of each range, ascending; the last range has no end.

        Returns:
            Values by the name of the range.
        """
        found = {}
        for of_counts in count_ranges(edges):
            parts = [[_within(scores, of_counts) for scores in of] for of in self.scores]
            values = [pooled_metric(of_data, metric, "all") for of_data in parts]
            found[of_counts.name] = median_of_known(values)
        return found


@dataclass(frozen=True)
class Effect:
    """The difference of a cell to its baseline, by column of `EFFECTS`.

    intervals: of the mean over seeds; None where the rows do not define the metric.
    of_seeds: the difference for each seed of both; seeds that do not define it are left out.
    """

    cell: Cell
    intervals: dict[str, Interval | None]
    of_seeds: dict[str, list[float]]


def read_results(cells: Sequence[Cell], plan: Plan) -> list[CellResult]:
    """Read the scores of the cells that are in the plan of finished runs.

    Raises:
        ValueError: a file of scores cannot be read.
    """
    runs = {run.folder for of_seeds in plan.values() for of_data in of_seeds for run in of_data}
    scores = {folder: read_scores(scores_file(folder, "test")) for folder in sorted(runs)}
    return [
        CellResult(
            cell,
            plan[cell.name],
            [[scores[run.folder] for run in of_data] for of_data in plan[cell.name]],
        )
        for cell in cells
        if cell.name in plan
    ]


def effects(results: Sequence[CellResult]) -> list[Effect]:
    """Compute the effect of each cell whose baseline has results too.

    Raises:
        ValueError: runs on one dataset have scored different rows.
    """
    by_name = {result.cell.name: result for result in results}
    pairs = [
        (by_name[result.cell.baseline], result)
        for result in results
        if result.cell.baseline in by_name
    ]
    return [_effect(first, second) for first, second in pairs]


def against_peers(results: Sequence[CellResult]) -> list[Effect]:
    """Compare the recipe, if it is among the results, with each of `PEERS` as its baseline.

    Raises:
        ValueError: runs on one dataset have scored different rows.
    """
    by_name = {result.cell.name: result for result in results}
    if RECIPE.name not in by_name:
        return []
    recipe = by_name[RECIPE.name]
    return [
        _effect(by_name[peer], replace(recipe, cell=replace(recipe.cell, baseline=peer)))
        for peer in PEERS
        if peer in by_name
    ]


def _effect(first: CellResult, second: CellResult) -> Effect:
    intervals, of_seeds = {}, {}
    for column in EFFECTS:
        intervals[column] = paired_difference(first.scores, second.scores, *COLUMNS[column])
        before, after = first.of_seeds(column), second.of_seeds(column)
        of_seeds[column] = [
            after[seed] - before[seed] for seed in sorted(before.keys() & after.keys())
        ]
    return Effect(second.cell, intervals, of_seeds)


def validation_metric(runs: Sequence[Training], metric: str, part: str = "all") -> float | None:
    """Average a validation metric of the chosen models over datasets, weighted by their rows."""
    reports = [run.metrics()["valid"] for run in runs]
    reports = [report if part == "all" else report[part] for report in reports]
    known = [report for report in reports if report[metric] is not None]
    if not known:
        return None
    weights = [report["num_samples"] for report in known]
    return float(np.average([report[metric] for report in known], weights=weights))


def median_of_known(values: Sequence[float | None]) -> float | None:
    """Return the median of the defined values; None if there are none."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _within(scores: SplitScores, of_counts: CountRange) -> SplitScores:
    """Select the rows of items whose training impressions are in the range."""
    inside = of_counts.holds(scores.counts)
    names = ("positions", "groups", "items", "counts", "labels", "logits")
    chosen: dict[str, Any] = {name: getattr(scores, name)[inside] for name in names}
    return replace(scores, **chosen)
