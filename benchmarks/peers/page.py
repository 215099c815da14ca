"""The page of peers: metrics of each, and what the recipe gains over each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.results import Result
from recsys.evaluation.bootstrap import Interval, paired_difference, pooled_metric
from recsys.evaluation.scores import SplitScores

METRICS = {
    "AUC": ("auc", "all"),
    "GAUC": ("gauc", "all"),
    "GAUC cold": ("gauc", "cold"),
    "GAUC unseen": ("gauc", "unseen"),
}
DIFFERENCES = ("GAUC", "GAUC unseen", "AUC")


@dataclass(frozen=True)
class Entry:
    """The trainings of a program.

    settings: what the trials chose.
    scores: of the test split, [seeds][windows].
    seconds: of each training.
    peak: most memory of a training in GB; None: not measured.
    """

    name: str
    settings: Mapping[str, Any]
    scores: list[list[SplitScores]]
    seconds: list[float]
    peak: float | None

    def metric(self, name: str) -> float:
        """Return the mean of a metric over seeds, pooled over windows; NaN if not defined."""
        values = [pooled_metric(of, *METRICS[name]) for of in self.scores]
        return float(np.mean([np.nan if value is None else value for value in values]))


def peers_result(
    entries: Sequence[Entry], windows: Sequence[str], trials: int, tuned_on: Sequence[str]
) -> Result:
    """Return the page; the first entry is compared with the others."""
    first, *others = entries
    gains = {entry.name: _gains(entry, first) for entry in others}
    records = [_record(entry, gains.get(entry.name, {}), windows) for entry in entries]
    rows = [_row(record, gains.get(record["program"], {})) for record in records]
    columns = ["program", *METRICS, *(f"{first.name} gains: {name}" for name in DIFFERENCES)]
    columns += ["seconds", "peak, GB"]
    reading = [
        f"{len(first.scores)} seeds, test rows of {', '.join(windows)} pooled: "
        f"{sum(len(of.positions) for of in first.scores[0]):,}. Each peer had {trials} trials on "
        f"the validation rows of {', '.join(tuned_on)}, by the mean of AUC and GAUC; the recipe is "
        "as it was. * the 95 % interval of a paired bootstrap of users excludes 0.",
        *(f"{entry.name}: `{json.dumps(dict(entry.settings))}`." for entry in entries[1:]),
    ]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        names = [entry.name for entry in entries]
        places = np.arange(len(names))
        for shift, metric in ((-0.2, "GAUC"), (0.2, "GAUC unseen")):
            axes.barh(
                places + shift, [entry.metric(metric) for entry in entries], 0.4, label=metric
            )
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.set_xlim(left=0.5)
        axes.set_xlabel("0.5 is chance")
        axes.legend()

    return Result("peers", "The recipe beside the field", records, columns, rows, draw, reading)


def _record(
    entry: Entry, gains: Mapping[str, Interval | None], windows: Sequence[str]
) -> dict[str, Any]:
    """Return everything that is known of a program, as JSON values."""
    return {
        "benchmark": "peers",
        "program": entry.name,
        "settings": dict(entry.settings),
        "seeds": len(entry.scores),
        "windows": list(windows),
        **{name: entry.metric(name) for name in METRICS},
        "seconds": median(entry.seconds),
        "peak_gb": entry.peak,
        "gain": {
            name: None if of is None else [of.value, of.low, of.high] for name, of in gains.items()
        },
    }


def _row(record: Mapping[str, Any], gains: Mapping[str, Interval | None]) -> list[str]:
    """Return the cells of a program."""
    peak = record["peak_gb"]
    return [
        record["program"],
        *(f"{record[name]:.4f}" for name in METRICS),
        *(_cell(gains.get(name)) for name in DIFFERENCES),
        f"{record['seconds']:.0f}",
        "-" if peak is None else f"{peak:.2f}",
    ]


def _gains(entry: Entry, first: Entry) -> dict[str, Interval | None]:
    """Return the differences of the first entry from another, by metric."""
    return {
        name: paired_difference(entry.scores, first.scores, *METRICS[name]) for name in DIFFERENCES
    }


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    star = " *" if interval.excludes_zero else ""
    return f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]{star}"
