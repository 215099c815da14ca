"""A search over settings by validation alone, recorded: all candidates and their ranking.

The candidates are in a YAML file, names to settings::

    recipe: {}
    less dropout: {ranking.dropout: 0.1}
    wider: {content.dim: 64, embedding.dim: 64}

Test metrics are not read, so that the settings chosen here may be tested later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quality.grid import Settings
from benchmarks.quality.page import provenance_words
from benchmarks.quality.plan import Plan
from benchmarks.quality.study import COLUMNS as METRICS
from benchmarks.quality.study import median_of_known, validation_metric
from benchmarks.results import markdown_table, without_places
from recsys.config.plain_yaml import load_plain_yaml
from recsys.data.filesystem import write_whole
from recsys.diagnostics.run_report.page import number

RANKED_BY = "GAUC"
COLUMNS = {RANKED_BY: METRICS[RANKED_BY], **METRICS}  # the ranking metric stands first


@dataclass(frozen=True)
class Candidate:
    """A set of settings that was tried: medians over seeds of validation, by `COLUMNS`."""

    name: str
    settings: Settings
    seeds: int
    metrics: dict[str, float | None]


def read_candidates(file: Path, only: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Read settings by name from a YAML file: all, or only those that are named.

    Raises:
        ValueError: the file is missing, does not map names to settings, or lacks a name.
    """
    if not file.is_file():
        raise ValueError(f"--search {file}: no such file")
    try:
        named = load_plain_yaml(file.read_bytes())
    except yaml.YAMLError as error:
        raise ValueError(f"--search {file}: {error}") from error
    if not isinstance(named, dict) or not named:
        raise ValueError(f"--search {file}: give names and their settings, `name: {{...}}`")
    for name, settings in named.items():
        if not isinstance(settings, dict):
            raise ValueError(
                f"--search {file}: '{name}' is {settings!r}; give settings by their full names, "
                "such as {ranking.dropout: 0.1}, or {} for the recipe itself"
            )
    unknown = sorted(set(only or ()) - set(named))
    if unknown:
        raise ValueError(f"--only: {unknown} are not in {file}; choose of {list(named)}")
    return {name: settings for name, settings in named.items() if only is None or name in only}


def ranked(named: Mapping[str, Settings], plan: Plan) -> list[Candidate]:
    """Rank the finished runs of a plan by their validation metrics, the best first."""
    found = [
        Candidate(name, settings, len(plan[name]), _medians(plan, name))
        for name, settings in named.items()
        if name in plan
    ]
    return sorted(found, key=lambda candidate: -(candidate.metrics[RANKED_BY] or 0.0))


def _medians(plan: Plan, name: str) -> dict[str, float | None]:
    return {
        column: median_of_known([validation_metric(of_data, *of) for of_data in plan[name]])
        for column, of in COLUMNS.items()
    }


def write_search(
    candidates: list[Candidate], datasets: list[str], about: Mapping[str, Any], files: Path
) -> None:
    """Write `FILES.md`, which appears whole or not at all."""
    rows = [
        [
            candidate.name,
            f"{candidate.seeds}",
            *(number(candidate.metrics[column]) for column in COLUMNS),
            f"`{json.dumps(dict(candidate.settings))}`" if candidate.settings else "",
        ]
        for candidate in candidates
    ]
    parts = [
        "# Search over settings",
        provenance_words(about),
        f"Validation split of {', '.join(datasets)}, medians over seeds, ranked by {RANKED_BY}; no "
        "test metric was looked at.",
        markdown_table(["tried", "seeds", *COLUMNS, "settings besides the recipe's"], rows),
    ]
    page = without_places("\n\n".join(parts) + "\n")
    write_whole(files.with_name(f"{files.name}.md"), page)
