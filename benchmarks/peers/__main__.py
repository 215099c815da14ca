"""Compare our recipe with public systems, on the same rows, labels, histories and item vectors.

    python -m benchmarks.peers --data DATA --out runs/peers

Each peer has its own environment and the same number of Optuna trials on validation, and trains on
every window with several seeds. Intervals are of a paired bootstrap of users. Finished trainings in
`--out` are read, not trained again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jsonargparse import auto_cli

from benchmarks.peers.catalogue import Peer, peers_named
from benchmarks.peers.rows import write_rows
from benchmarks.peers.trainings import PeerTraining, tuned
from benchmarks.quality.runs import RECIPE, finish, in_order, plan_runs, windows
from benchmarks.results import RESULTS, Result, require_other_folder, write_result
from recsys.evaluation.bootstrap import Interval, paired_difference, pooled_metric
from recsys.evaluation.scores import SplitScores, read_scores, scores_file

OURS = "recsys, the recipe"
QUICK_ROWS = 2000


def peers(
    data: str,
    out: Path,
    seeds: int = 3,
    trials: int = 10,
    tune_on: list[str] | None = None,
    only: list[str] | None = None,
    jobs: int = 1,
    runs: Path | None = None,
    recipe: Path = RECIPE,
    quick: bool = False,
    results: Path = RESULTS,
    page: str = "peers",
) -> None:
    """Train everything that is not finished, and write the page.

    Args:
        data: a dataset, or a folder of its windows, which are pooled.
        out: folder of rows, environments, studies and trainings.
        seeds: trainings of each on each window.
        trials: trials of each peer.
        tune_on: windows whose validation chooses settings; default: the middle one.
        only: peers by name; default: all.
        jobs: trainings side by side, one thread each.
        runs: folder of the recipe's runs, which `benchmarks.quality` may share; default: in `out`.
        recipe: the recipe.
        quick: try the peers on a few rows, each with the first trial; the recipe is left out.
        results: folder for the figures.
        page: name of these files.

    Raises:
        ValueError: a name is unknown, or `data` is no dataset.
        RuntimeError: a training failed; names its log.
    """
    require_other_folder(quick, results)
    out = out.absolute()  # programs run in folders of their own
    datasets, selected = windows(data), peers_named(only)
    if unknown := sorted(set(tune_on or ()) - datasets.keys()):
        raise ValueError(f"--tune_on: {unknown} are unknown; choose of {list(datasets)}")
    if quick:
        datasets, seeds, trials = dict(list(datasets.items())[:1]), 1, 1
    names = list(datasets)
    folder = out / ("quick" if quick else "rows")
    rows = {name: folder / name for name in names}
    for name, dataset in datasets.items():
        write_rows(dataset, recipe, rows[name], QUICK_ROWS if quick else None)
    tuning = [rows[name] for name in tune_on or [names[len(names) // 2]]]
    entries = [] if quick else [_recipe(datasets, recipe, runs or out / "runs", seeds, jobs)]
    for peer in selected:
        settings = tuned(peer, tuning, trials, out)
        entries.append(_entry(peer, settings, rows, seeds, jobs, out))
        if peer.final:
            final = _entry(peer, settings | dict(peer.final), rows, seeds, jobs, out)
            entries[-1] = replace(entries[-1], name=f"{peer.name}: as in its trials")
            entries.append(final)
    result = peers_result(entries, names, trials, [window.name for window in tuning])
    write_result(replace(result, name=page), results)


def _recipe(datasets: dict[str, str], recipe: Path, runs: Path, seeds: int, jobs: int) -> Entry:
    plan = plan_runs({OURS: {}}, datasets, runs, recipe, range(seeds))
    finish(in_order(plan), jobs, None)
    runs_by_seed = plan[OURS]
    scores = [
        [read_scores(scores_file(run.folder, "test")) for run in seed_runs]
        for seed_runs in runs_by_seed
    ]
    seconds = [run.metrics()["train"]["seconds"] for seed_runs in runs_by_seed for run in seed_runs]
    return Entry(OURS, {}, scores, seconds, None)


def _entry(
    peer: Peer, settings: dict[str, object], rows: dict[str, Path], seeds: int, jobs: int, out: Path
) -> Entry:
    trainings = [
        [PeerTraining(peer, folder, settings, seed, out) for folder in rows.values()]
        for seed in range(seeds)
    ]
    with ThreadPoolExecutor(jobs) as pool:
        scores = [
            list(pool.map(lambda training: training.scores("test"), seed_trainings))
            for seed_trainings in trainings
        ]
    costs = [training.cost() for seed_trainings in trainings for training in seed_trainings]
    peak = max(peak for _, peak in costs)
    return Entry(peer.name, settings, scores, [seconds for seconds, _ in costs], peak)


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
        values = [pooled_metric(windows, *METRICS[name]) for windows in self.scores]
        return float(np.mean([np.nan if value is None else value for value in values]))


def peers_result(
    entries: Sequence[Entry], windows: Sequence[str], trials: int, tuned_on: Sequence[str]
) -> Result:
    """Return the page; the first entry is compared with the others."""
    first, *peers = entries
    gains = {entry.name: _gains(entry, first) for entry in peers}
    records = [_record(entry, gains.get(entry.name, {}), windows) for entry in entries]
    rows = [_row(record, gains.get(record["program"], {})) for record in records]
    columns = ["program", *METRICS, *(f"{first.name} gains: {name}" for name in DIFFERENCES)]
    columns += ["seconds", "peak, GB"]
    num_rows = sum(len(window.positions) for window in first.scores[0])
    reading = [
        f"{len(first.scores)} seeds, test rows of {', '.join(windows)} pooled: {num_rows:,}. "
        f"Each peer had {trials} trials on the validation rows of {', '.join(tuned_on)}, by the "
        "mean of AUC and GAUC; the recipe is as it was. * the 95 % interval of a paired bootstrap "
        "of users excludes 0.",
        *(f"{entry.name}: `{json.dumps(dict(entry.settings))}`." for entry in entries[1:]),
    ]

    return Result("peers", "The recipe beside the field", records, columns, rows, None, reading)


def _record(
    entry: Entry, gains: Mapping[str, Interval | None], windows: Sequence[str]
) -> dict[str, Any]:
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
            name: None if interval is None else [interval.value, interval.low, interval.high]
            for name, interval in gains.items()
        },
    }


def _row(record: Mapping[str, Any], gains: Mapping[str, Interval | None]) -> list[str]:
    peak = record["peak_gb"]
    return [
        record["program"],
        *(f"{record[name]:.4f}" for name in METRICS),
        *(_cell(gains.get(name)) for name in DIFFERENCES),
        f"{record['seconds']:.0f}",
        "-" if peak is None else f"{peak:.2f}",
    ]


def _gains(entry: Entry, first: Entry) -> dict[str, Interval | None]:
    return {
        name: paired_difference(entry.scores, first.scores, *METRICS[name]) for name in DIFFERENCES
    }


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    star = " *" if interval.excludes_zero else ""
    return f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]{star}"


if __name__ == "__main__":
    auto_cli(peers, as_positional=False)
