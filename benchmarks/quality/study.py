"""Results of a study's finished runs: medians over seeds, and effects with their intervals.

Windows are pooled. An effect is the difference of a cell to its baseline, with an interval of the
paired bootstrap over users (`recsys.evaluation.bootstrap`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.quality.grid import PEERS, RECIPE, Cell
from benchmarks.quality.runs import Plan, Training
from benchmarks.results import markdown_table, without_local_paths
from recsys.config import BestModelBy, load_config
from recsys.evaluation.bootstrap import Interval, metric_users, paired_difference, pooled_metric
from recsys.evaluation.metrics import FEW_USERS_NOTE, MIN_USERS, in_parentheses
from recsys.evaluation.model_selection import selection_text
from recsys.evaluation.scores import SplitScores, read_scores, scores_file
from recsys.storage.files import atomic_write

COLUMNS = {
    "AUC": ("auc", "all"),
    "GAUC": ("gauc", "all"),
    "GAUC cold": ("gauc", "cold"),
    "GAUC unseen": ("gauc", "unseen"),
    "AUC unseen": ("auc", "unseen"),
}
EFFECTS = ("GAUC", "GAUC cold", "GAUC unseen", "AUC", "AUC unseen")
INTERVALS = (
    "An effect is the mean over seeds of a cell minus that of its baseline. Intervals are 95 % of "
    "a paired bootstrap: all rows of a user, in all windows and in both cells, are drawn together, "
    "2,000 times; they are stretched for few users, as Student's t is, and below "
    f"{MIN_USERS} users there is none. They tell what other users would say, not other seeds. An "
    "effect counts where its interval excludes 0; of many effects that are nothing, about one in "
    "twenty does so by chance."
)

COSTS = (
    "Times are those of a clock, and other programs on the machine lengthen them. Memory is the "
    "most that the process of a training held. Both are medians over runs."
)


@dataclass(frozen=True)
class CellResult:
    """The finished runs of a cell and their scores, each [seeds][datasets]."""

    cell: Cell
    runs: list[list[Training]]
    scores: list[list[SplitScores]]

    def by_seed(self, column: str) -> dict[int, float]:
        """Return a column of `COLUMNS` by seed; seeds whose rows do not define it are left out."""
        metric, subset = COLUMNS[column]
        seeds = [runs[0].seed for runs in self.runs]
        values = [pooled_metric(runs, metric, subset) for runs in self.scores]
        return {seed: value for seed, value in zip(seeds, values) if value is not None}

    def in_window(self, position: int) -> "CellResult":
        """Return the runs and scores on one dataset alone."""
        runs = [[by_window[position]] for by_window in self.runs]
        return replace(self, runs=runs, scores=[[scores[position]] for scores in self.scores])

    def users(self, column: str) -> int:
        return metric_users(self.scores[0], *COLUMNS[column])

    def median(self, column: str) -> float | None:
        return median_of_known(list(self.by_seed(column).values()))

    def training(self, key: str) -> float | None:
        """Return the median of a figure of the trainings: `seconds`, or `peak_bytes` of memory."""
        return median_of_known(
            [run.metrics()["train"].get(key) for runs in self.runs for run in runs]
        )

    @property
    def best_model_by(self) -> BestModelBy:
        run = self.runs[0][0]
        return load_config(run.recipe, list(run.overrides)).best_model_by


@dataclass(frozen=True)
class Effect:
    """The difference of a cell to its baseline, by column of `EFFECTS`.

    intervals: of the mean over seeds; None where the rows do not define the metric.
    by_seed: the difference for each seed of both; seeds that do not define it are left out.
    """

    cell: Cell
    intervals: dict[str, Interval | None]
    by_seed: dict[str, list[float]]


def read_results(cells: Sequence[Cell], plan: Plan) -> list[CellResult]:
    """Read the scores of the cells that are in the plan of finished runs.

    Raises:
        ValueError: a file of scores cannot be read.
    """
    runs = {run.folder for by_seed in plan.values() for runs in by_seed for run in runs}
    scores = {folder: read_scores(scores_file(folder, "test")) for folder in sorted(runs)}
    return [
        CellResult(
            cell,
            plan[cell.name],
            [[scores[run.folder] for run in runs] for runs in plan[cell.name]],
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


def window_effects(results: Sequence[CellResult]) -> list[list[Effect]]:
    """Compute the effects on each of several windows alone; none on one dataset.

    Raises:
        ValueError: runs on one dataset have scored different rows.
    """
    num_windows = len(results[0].scores[0])
    if num_windows == 1:
        return []
    return [effects([result.in_window(n) for result in results]) for n in range(num_windows)]


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
    intervals, by_seed = {}, {}
    for column in EFFECTS:
        intervals[column] = paired_difference(first.scores, second.scores, *COLUMNS[column])
        baseline, changed = first.by_seed(column), second.by_seed(column)
        by_seed[column] = [
            changed[seed] - baseline[seed] for seed in sorted(baseline.keys() & changed.keys())
        ]
    return Effect(second.cell, intervals, by_seed)


def validation_metric(runs: Sequence[Training], metric: str, subset: str = "all") -> float | None:
    """Average a validation metric of the chosen models over datasets, weighted by their rows."""
    reports = [run.metrics()["valid"] for run in runs]
    reports = [report if subset == "all" else report[subset] for report in reports]
    defined = [report for report in reports if report[metric] is not None]
    if not defined:
        return None
    weights = [report["num_samples"] for report in defined]
    return float(np.average([report[metric] for report in defined], weights=weights))


def median_of_known(values: Sequence[float | None]) -> float | None:
    """Return the median of the defined values; None if there are none."""
    defined = [value for value in values if value is not None]
    return median(defined) if defined else None


@dataclass(frozen=True)
class Study:
    """A finished study: results, effects against baselines and peers, datasets, provenance.

    tables: further ones for the page.
    """

    results: list[CellResult]
    datasets: list[str]
    provenance: Mapping[str, Any]
    tables: tuple[str, ...] = ()

    @property
    def protocol(self) -> str:
        rows = sum(len(scores.positions) for scores in self.results[0].scores[0])
        selection = selection_text(self.results[0].best_model_by)
        return (
            f"Test split of {', '.join(self.datasets)}: {rows:,} impressions. Every cell has the "
            "same data and the recipe's batch size, epochs and rule of early stopping; the "
            f"{selection} of validation chooses the model that is tested."
        )


def write_study(study: Study, files: Path) -> None:
    """Write `FILES.md` and `FILES.jsonl`, each whole or not at all."""
    cell_effects, peer_effects = effects(study.results), against_peers(study.results)
    records = [
        json.dumps({**record, **study.provenance})
        for record in _records(study, cell_effects, peer_effects)
    ]
    lines = ["# Quality of each part", provenance_text(study.provenance), study.protocol]
    lines += [_headline(study.results), COSTS, FEW_USERS_NOTE]
    if cell_effects:
        lines += [INTERVALS, _effect_table(cell_effects)]
    if peer_effects:
        lines += ["The recipe against its peers:", _effect_table(peer_effects)]
    by_window = window_effects(study.results) if cell_effects else []
    for dataset, dataset_effects in zip(study.datasets, by_window):
        lines += [f"In {dataset} alone:", _effect_table(dataset_effects)]
    lines += study.tables
    texts = {"jsonl": "\n".join(records) + "\n", "md": "\n\n".join(lines) + "\n"}
    for ending, text in texts.items():
        atomic_write(files.with_name(f"{files.name}.{ending}"), without_local_paths(text))


def provenance_text(metadata: Mapping[str, Any]) -> str:
    """Describe command, commit and date in a sentence."""
    changed = " with uncommitted changes" if metadata["uncommitted_changes"] else ""
    return f"`{metadata['command']}`, commit {metadata['commit']}{changed}, {metadata['date']}."


def _records(
    study: Study, cell_effects: list[Effect], peer_effects: list[Effect]
) -> list[dict[str, Any]]:
    baseline_effects = {effect.cell.name: _effect_record(effect) for effect in cell_effects}
    peer_records = {effect.cell.baseline: _effect_record(effect) for effect in peer_effects}
    return [
        {
            "benchmark": "quality",
            **asdict(result.cell),
            "datasets": study.datasets,
            "seeds": [runs[0].seed for runs in result.runs],
            "median": {column: result.median(column) for column in COLUMNS},
            "by_seed": {column: result.by_seed(column) for column in COLUMNS},
            "validation_auc": [validation_metric(runs, "auc") for runs in result.runs],
            "effect": baseline_effects.get(result.cell.name, {}),
            "recipe_against_it": peer_records.get(result.cell.name, {}),
            "runs": [[run.folder.name for run in runs] for runs in result.runs],
            "train_seconds": result.training("seconds"),
            "peak_bytes": result.training("peak_bytes"),
        }
        for result in study.results
    ]


def _effect_record(effect: Effect) -> dict[str, Any]:
    return {
        column: {
            **asdict(interval),
            "excludes_zero": interval.excludes_zero,
            "of_seeds": effect.by_seed[column],
        }
        for column, interval in effect.intervals.items()
        if interval is not None
    }


def _headline(results: Sequence[CellResult]) -> str:
    rows = [
        [
            result.cell.name,
            f"{len(result.runs)}",
            *(in_parentheses(_number(result.median(c)), result.users(c)) for c in COLUMNS),
            f"{result.training('seconds') or 0:,.0f}",
            f"{(result.training('peak_bytes') or 0) / 2**30:.1f}",
        ]
        for result in results
    ]
    titles = ("cell, median over seeds", "seeds", *COLUMNS, "training, s", "memory, GiB")
    return markdown_table(titles, rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _effect_table(effects: Sequence[Effect]) -> str:
    rows = [
        [
            f"{effect.cell.name} – {effect.cell.baseline}",
            *(interval_cell(effect.intervals[column]) for column in EFFECTS),
        ]
        for effect in effects
    ]
    return markdown_table(("effect (* counts)", *EFFECTS), rows)


def interval_cell(interval: Interval | None) -> str:
    """Return a value with its interval, and a star if the interval excludes 0."""
    if interval is None:
        return "–"
    star = " *" if interval.excludes_zero else ""
    text = f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]{star}"
    return text.replace(" ", "\N{NO-BREAK SPACE}")
