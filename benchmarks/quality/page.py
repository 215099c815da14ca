"""Output of the quality study: a Markdown table, JSON lines and one HTML page of figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quality.figures import (
    MOST_CELLS,
    cold_start_curves,
    effect_bars,
    learning_curves,
    popularity_bars,
)
from benchmarks.quality.grid import DRAWN
from benchmarks.quality.study import (
    COLUMNS,
    EFFECTS,
    CellResult,
    Effect,
    median_of_known,
    validation_metric,
)
from benchmarks.results import markdown_table, without_places
from recsys.data.filesystem import write_whole
from recsys.diagnostics.run_report.item_popularity import BUCKETS
from recsys.diagnostics.run_report.page import Section, Table, html_page, number
from recsys.evaluation.bootstrap import Interval
from recsys.evaluation.metrics import LEAST_USERS, MARK_NOTE, marked
from recsys.evaluation.model_selection import selection_words

INTERVALS = (
    "An effect is the mean over seeds of a cell minus that of its baseline. Intervals are 95 % of "
    "a paired bootstrap: all rows of a user, in all windows and in both cells, are drawn together, "
    "2,000 times; they are stretched for few users, as Student's t is, and below "
    f"{LEAST_USERS} users there is none. They tell what other users would say, not other seeds. An "
    "effect counts where its interval excludes 0; of many effects that are nothing, about one in "
    "twenty does so by chance."
)
PEERS_TITLE = "The recipe against its peers"


@dataclass(frozen=True)
class Study:
    """A finished study.

    effects: effects of each cell against its baseline.
    against_peers: effects of the recipe against its peers.
    datasets: names of the datasets.
    about: machine, versions, commit, date and command.
    """

    results: list[CellResult]
    effects: list[Effect]
    against_peers: list[Effect]
    datasets: list[str]
    about: Mapping[str, Any]

    @property
    def protocol(self) -> str:
        """Description of the runs, in words."""
        rows = sum(len(scores.positions) for scores in self.results[0].scores[0])
        datasets = ", ".join(self.datasets)
        chosen_by = selection_words(self.results[0].best_model_by)
        return (
            f"Test split of {datasets}: {rows:,} impressions. Every cell has the same data and the "
            f"recipe's batch size, epochs and rule of early stopping; the {chosen_by} of "
            "validation chooses the model that is tested."
        )


def write_study(study: Study, files: Path, with_page: bool = True) -> None:
    """Write `FILES.md`, `FILES.jsonl` and the page `FILES.html`, each whole or not at all."""
    lines = [json.dumps({**record, **study.about}) for record in _records(study)]
    texts = {"jsonl": "\n".join(lines) + "\n", "md": _markdown(study)}
    if with_page:
        texts["html"] = _html(study)
        texts["md"] += f"\nAll figures: `{files.name}.html`.\n"
    for ending, text in texts.items():
        write_whole(files.with_name(f"{files.name}.{ending}"), without_places(text))


def provenance_words(about: Mapping[str, Any]) -> str:
    """Describe command, commit and date in a sentence."""
    changed = " with uncommitted changes" if about["uncommitted_changes"] else ""
    return f"`{about['command']}`, commit {about['commit']}{changed}, {about['date']}."


def _records(study: Study) -> list[dict[str, Any]]:
    """Return one record per cell: its metrics by seed, its effect, and the folders of its runs."""
    of_cells = {effect.cell.name: _effect_record(effect) for effect in study.effects}
    of_peers = {effect.cell.baseline: _effect_record(effect) for effect in study.against_peers}
    return [
        {
            "benchmark": "quality",
            **asdict(result.cell),
            "datasets": study.datasets,
            "seeds": [of_data[0].seed for of_data in result.runs],
            "median": {column: result.median(column) for column in COLUMNS},
            "by_seed": {column: result.of_seeds(column) for column in COLUMNS},
            "validation_auc": [validation_metric(of_data, "auc") for of_data in result.runs],
            "effect": of_cells.get(result.cell.name, {}),
            "recipe_against_it": of_peers.get(result.cell.name, {}),
            "runs": [[run.folder.name for run in of_data] for of_data in result.runs],
            "train_seconds": median_of_known(
                [run.metrics()["train"]["seconds"] for of_data in result.runs for run in of_data]
            ),
        }
        for result in study.results
    ]


def _effect_record(effect: Effect) -> dict[str, Any]:
    return {
        column: {
            **asdict(interval),
            "excludes_zero": interval.excludes_zero,
            "of_seeds": effect.of_seeds[column],
        }
        for column, interval in effect.intervals.items()
        if interval is not None
    }


def _markdown(study: Study) -> str:
    lines = ["# Quality of each part", provenance_words(study.about), study.protocol]
    lines += [_as_markdown(_headline(study.results)), MARK_NOTE]
    if study.effects:
        lines += [INTERVALS, _as_markdown(_effect_table(study.effects))]
    if study.against_peers:
        lines += [PEERS_TITLE + ":", _as_markdown(_effect_table(study.against_peers))]
    return "\n\n".join(lines) + "\n"


def _html(study: Study) -> str:
    sections = [
        Section(
            "Test metrics",
            [study.protocol],
            tables=[_headline(study.results)],
        )
    ]
    if study.effects:
        bars, table = effect_bars(study.effects), _effect_table(study.effects)
        sections += [
            Section("Effect of each part", [INTERVALS], [bars], [table]),
            Section("Effects in words", list(map(effect_sentence, study.effects))),
        ]
    if study.against_peers:
        words = list(map(effect_sentence, study.against_peers))
        sections += [Section(PEERS_TITLE, words, tables=[_effect_table(study.against_peers)])]
    drawn = _drawn_cells(study.results)
    sections += [
        Section("Learning curves", drawings=[learning_curves(drawn)]),
        Section(
            "Quality by item popularity",
            [
                "An item without training impressions has an ID vector that was never trained: "
                "what is known of it comes from its content alone."
            ],
            [popularity_bars(drawn), cold_start_curves(drawn)],
            [_popularity_table(drawn)],
        ),
        Section("Cells", text=_cell_text(study.results)),
        Section("Provenance", text=json.dumps(study.about, indent=1)),
    ]
    return html_page("Quality of each part", sections)


def _drawn_cells(results: Sequence[CellResult]) -> list[CellResult]:
    """Return the cells that the grid wants drawn; if there are none, the first few."""
    wanted = [result for result in results if result.cell.name in DRAWN]
    return wanted or list(results[:MOST_CELLS])


def _headline(results: Sequence[CellResult]) -> Table:
    rows = [
        (
            result.cell.name,
            f"{len(result.runs)}",
            *(marked(number(result.median(column)), result.users(column)) for column in COLUMNS),
        )
        for result in results
    ]
    return Table(("cell, median over seeds", "seeds", *COLUMNS), rows)


def _effect_table(effects: Sequence[Effect]) -> Table:
    rows = [
        (
            f"{effect.cell.name} – {effect.cell.baseline}",
            *(_interval_cell(effect.intervals[column]) for column in EFFECTS),
        )
        for effect in effects
    ]
    return Table(("effect (* counts)", *EFFECTS), rows)


def _interval_cell(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    mark = " *" if interval.excludes_zero else ""
    text = f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]{mark}"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def effect_sentence(effect: Effect) -> str:
    """Describe the intervals of an effect in words."""
    said = [_interval_words(effect, column) for column in effect.intervals]
    return f"{effect.cell.name} against {effect.cell.baseline}: {'. '.join(said)}."


def _interval_words(effect: Effect, column: str) -> str:
    interval, of_seeds = effect.intervals[column], effect.of_seeds[column]
    if interval is None:
        return f"{column} is not defined"
    verdict = "counts" if interval.excludes_zero else "does not count (its interval contains 0)"
    between = f"between {interval.low:+.4f} and {interval.high:+.4f}"
    words = f"{column} {interval.value:+.4f}, {between}, {verdict}"
    if len(of_seeds) > 1:
        words += f"; single seeds from {min(of_seeds):+.4f} to {max(of_seeds):+.4f}"
    return words


def _popularity_table(results: Sequence[CellResult]) -> Table:
    by_cell = {result.cell.name: result.by_count("gauc", BUCKETS) for result in results}
    ranges = list(next(iter(by_cell.values())))
    rows = [(name, *(number(values[of]) for of in ranges)) for name, values in by_cell.items()]
    return Table(("GAUC by training impressions", *ranges), rows)


def _cell_text(results: Sequence[CellResult]) -> str:
    """Return reason and changes of each cell as YAML."""
    about = {
        result.cell.name: {
            "baseline": result.cell.baseline,
            "reason": result.cell.reason,
            "settings": dict(result.cell.settings),
        }
        for result in results
    }
    return yaml.safe_dump(about, sort_keys=False, width=100, allow_unicode=True)


def _as_markdown(table: Table) -> str:
    return markdown_table(list(table.head), [list(row) for row in table.rows])
