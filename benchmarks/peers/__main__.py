"""Our recipe beside programs of the field, on the same rows, labels, histories and item vectors.

    python -m benchmarks.peers --data DATA --out runs/peers

Each peer is installed from the package index into an environment of its own, tuned on validation by
the same number of Optuna trials, and trained on every window with several seeds. The recipe is
trained as it is. Differences have the intervals of a paired bootstrap of users. Writes
`peers.jsonl`, `.md` and `.png` into `--results`. Finished trainings in `--out` are read, not
trained again.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jsonargparse import auto_cli

from benchmarks.peers.catalogue import Peer, peers_named
from benchmarks.peers.page import Entry, peers_result
from benchmarks.peers.rows import write_rows
from benchmarks.peers.trainings import PeerTraining
from benchmarks.peers.tuning import tuned
from benchmarks.quality.plan import in_order, plan_runs, windows
from benchmarks.quality.runs import RECIPE, finish
from benchmarks.results import RESULTS, require_own_folder, write_result
from recsys.evaluation.scores import read_scores, scores_file

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

    Raises:
        ValueError: a name is unknown, or `data` is no dataset.
        RuntimeError: a training failed; names its log.
    """
    require_own_folder(quick, results)
    datasets, chosen = windows(data), peers_named(only)
    if unknown := sorted(set(tune_on or ()) - datasets.keys()):
        raise ValueError(f"--tune_on: {unknown} are unknown; choose of {list(datasets)}")
    if quick:
        datasets, seeds, trials = dict(list(datasets.items())[:1]), 1, 1
    names = list(datasets)
    folder = out / ("quick" if quick else "rows")
    rows = {name: folder / name for name in names}
    for name, place in datasets.items():
        write_rows(place, recipe, rows[name], QUICK_ROWS if quick else None)
    tuning = [rows[name] for name in tune_on or [names[len(names) // 2]]]
    entries = [] if quick else [_recipe(datasets, recipe, runs or out / "runs", seeds, jobs)]
    for peer in chosen:
        entries.append(_entry(peer, tuned(peer, tuning, trials, out), rows, seeds, jobs, out))
    write_result(peers_result(entries, names, trials, [each.name for each in tuning]), results)


def _recipe(datasets: dict[str, str], recipe: Path, runs: Path, seeds: int, jobs: int) -> Entry:
    """Train the recipe and return its scores."""
    plan = plan_runs({OURS: {}}, datasets, runs, recipe, seeds)
    finish(in_order(plan), jobs, None)
    of_seeds = plan[OURS]
    scores = [[read_scores(scores_file(run.folder, "test")) for run in of] for of in of_seeds]
    seconds = [run.metrics()["train"]["seconds"] for of in of_seeds for run in of]
    return Entry(OURS, {}, scores, seconds, None)


def _entry(
    peer: Peer, settings: dict[str, object], rows: dict[str, Path], seeds: int, jobs: int, out: Path
) -> Entry:
    """Train a peer and return its scores."""
    trainings = [
        [PeerTraining(peer, place, settings, seed, out) for place in rows.values()]
        for seed in range(seeds)
    ]
    with ThreadPoolExecutor(jobs) as pool:
        scores = [list(pool.map(lambda each: each.scores("test"), of)) for of in trainings]
    costs = [training.cost() for of in trainings for training in of]
    peak = max(peak for _, peak in costs)
    return Entry(peer.name, settings, scores, [seconds for seconds, _ in costs], peak)


if __name__ == "__main__":
    auto_cli(peers, as_positional=False)
