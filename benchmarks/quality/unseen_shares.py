r"""Measure what content gains by the share of unseen items among positives, in each window.

    python -m benchmarks quality unseen-shares --out runs/shares \
        --data '{"MovieLens": "data/movielens_windows", "IFDB": "data/ifdb_windows"}' \
        --recipes '{"IFDB": "recsys/recipes/ifdb.yaml"}'

Trains the recipe, and the recipe without content, on each window. Finished runs are read.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.quality.grid import ID_ONLY
from benchmarks.quality.runs import RECIPE, Training, finish, in_order, plan_runs, windows
from benchmarks.quality.study import interval_cell
from benchmarks.results import RESULTS, Result, write_result
from recsys.evaluation.bootstrap import Interval, paired_difference
from recsys.evaluation.scores import read_scores, scores_file

CELLS = {"ID only": ID_ONLY.settings, "recipe": {}}


def unseen_shares(
    data: dict[str, str],
    out: Path,
    recipes: dict[str, Path] | None = None,
    seeds: int = 1,
    jobs: int = 1,
    cache: Path | None = None,
    results: Path = RESULTS,
) -> None:
    """Train what is not finished, and write the page with its plot.

    Args:
        data: by title, a dataset or a folder of its windows.
        out: folder of the runs, which `benchmarks quality parts` may share.
        recipes: by title, the recipe; default: that for MovieLens.
        seeds: trainings of each on each window.
        jobs: trainings side by side, one thread each.
        cache: folder of encoded items; default: the usual one.
        results: folder for the figures.

    Raises:
        ValueError: a title has a recipe and no data, or `data` is no dataset.
        RuntimeError: a training failed; names its log.
    """
    recipes = recipes or {}
    if unknown := sorted(recipes.keys() - data.keys()):
        raise ValueError(f"--recipes: {unknown} have no data; --data has {list(data)}")
    plans = {
        title: plan_runs(
            CELLS, windows(path), out / title, recipes.get(title, RECIPE), range(seeds)
        )
        for title, path in data.items()
    }
    finish([run for plan in plans.values() for run in in_order(plan)], jobs, cache)
    records = []
    for title, plan in plans.items():
        for index, window in enumerate(windows(data[title])):
            runs = [[by_seed[index] for by_seed in plan[name]] for name in CELLS]
            records.append({"benchmark": "unseen_shares", "data": title, "window": window})
            records[-1] |= _gains_of_window(*runs)
    write_result(_result(records), results)


def _gains_of_window(id_only: list[Training], recipe: list[Training]) -> dict[str, Any]:
    """Return the share of unseen items among positives, and what the recipe gains.

    Runs are by seed.
    """
    first, second = (
        [[read_scores(scores_file(run.folder, "test"))] for run in runs]
        for runs in (id_only, recipe)
    )
    scores = second[0][0]
    gains = {
        rows: paired_difference(first, second, "gauc", rows) for rows in ("all", "warm", "unseen")
    }
    return {
        "share": float(np.mean(scores.counts[scores.labels[:, 0] > 0] == 0)),
        "rows": len(scores.counts),
        "gains": gains,
    }


def _result(records: list[dict[str, Any]]) -> Result:
    rows = [
        [
            f"{record['data']}, {record['window']}",
            f"{record['rows']:,}",
            f"{record['share']:.1%}",
            *(interval_cell(record["gains"][subset]) for subset in ("all", "warm", "unseen")),
        ]
        for record in records
    ]
    columns = ["test rows of", "rows", "unseen share", "GAUC gained", "on warm items"]
    columns += ["on unseen items"]
    reading = [
        "The recipe less the same without content, as the mean over seeds; 95 % intervals of a "
        "paired bootstrap of users. The share is that of the positive rows of test."
    ]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="share of positives of test whose item training never saw")
        axes.set_ylabel("GAUC gained by content")
        axes.axhline(0, color="grey", linewidth=0.8)
        for title in dict.fromkeys(record["data"] for record in records):
            points = [r for r in records if r["data"] == title and r["gains"]["all"] is not None]
            values = [point["gains"]["all"].value for point in points]
            errors = [_margins(point["gains"]["all"]) for point in points]
            shares = [point["share"] for point in points]
            axes.errorbar(shares, values, np.transpose(errors), fmt="o", capsize=3, label=title)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.legend()

    title = "What does content gain, by the share of unseen items?"
    plain = [{**record, "gains": _plain(record["gains"])} for record in records]
    return Result("unseen_shares", title, plain, columns, rows, draw, reading)


def _margins(interval: Interval) -> tuple[float, float]:
    return interval.value - interval.low, interval.high - interval.value


def _plain(gains: dict[str, Interval | None]) -> dict[str, list[float] | None]:
    return {
        subset: None if gain is None else [gain.value, gain.low, gain.high]
        for subset, gain in gains.items()
    }


if __name__ == "__main__":
    auto_cli(unseen_shares, as_positional=False)
