"""The quality study: the gain of each part of the model, with one budget for all.

    python -m benchmarks.quality --data DATA --out runs/quality --grid full --seeds 3

Trains the cells of a grid (`benchmarks.quality.grid`) with several seeds, on a dataset or on all
windows of a rolling split, and writes a Markdown table, JSON lines and one HTML page with figures.
Finished runs are not trained again, so the same command continues where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import auto_cli

from benchmarks.quality.cells import Cell
from benchmarks.quality.grid import chosen_cells
from benchmarks.quality.page import Study, write_study
from benchmarks.quality.plan import Plan, finished, in_order, plan_runs, windows
from benchmarks.quality.runs import RECIPE, finish
from benchmarks.quality.study import against_peers, effects, read_results
from benchmarks.results import RESULTS, provenance
from benchmarks.timing.ranks import is_launched


def quality(
    data: str,
    out: Path,
    seeds: int = 3,
    grid: str = "parts",
    only: list[str] | None = None,
    jobs: int = 1,
    cache: Path | None = None,
    recipe: Path = RECIPE,
    results: Path | None = None,
    train: bool = True,
    page: bool = True,
) -> None:
    """Train the unfinished runs, and write the results of all finished ones.

    Args:
        data: a dataset, or a folder of its windows, which are pooled.
        out: folder of the runs.
        seeds: runs per cell and dataset.
        grid: parts, history, text or full.
        only: cells of the grid by name; default: all.
        jobs: how many runs train side by side, one thread each.
        cache: folder of encoded items; default: the usual one.
        recipe: the recipe that cells change.
        results: files to write, without their ending; default: benchmarks/results/quality.
        train: false trains nothing and writes the results of the finished runs, even if incomplete.
        page: write the HTML page, too.

    Raises:
        ValueError: a name, setting or dataset is invalid.
        RuntimeError: a run failed; names its log.
    """
    if min(seeds, jobs) < 1:
        raise ValueError(f"--seeds {seeds} --jobs {jobs}: both must be at least 1")
    if is_launched():
        raise ValueError("quality starts its runs itself; use --nproc 1, and --jobs for more")
    datasets = windows(data)
    cells = chosen_cells(grid, only)
    settings = {cell.name: cell.settings for cell in cells}
    plan = plan_runs(settings, datasets, out, recipe, seeds)
    _require_effects(cells, plan)
    found = read_results(cells, _trained(plan, jobs, cache, train))
    files = results or RESULTS / "quality"
    about = provenance()
    study = Study(found, effects(found), against_peers(found), list(datasets), about)
    write_study(study, files, with_page=page)
    print(files.with_name(f"{files.name}.md").read_text())


def _require_effects(cells: Sequence[Cell], plan: Plan) -> None:
    """Require that every cell differs from its baseline.

    Raises:
        ValueError: under this recipe a cell and its baseline are the same configuration.
    """
    folders = {name: of_seeds[0][0].folder for name, of_seeds in plan.items()}
    for cell in cells:
        if cell.baseline in folders and folders[cell.name] == folders[cell.baseline]:
            raise ValueError(
                f"'{cell.name}' changes nothing of '{cell.baseline}' with this recipe; change the "
                "recipe (a contrastive.weight of 0 leaves no CIC to compare) or leave the cell "
                "out with --only"
            )


def _trained(plan: Plan, jobs: int, cache: Path | None, train: bool) -> Plan:
    """Return the plan's finished runs, after training the others if `train`.

    Raises:
        ValueError: no run is finished, and `train` is false.
    """
    if train:
        finish(in_order(plan), jobs, cache)
    done = finished(plan)
    if not done:
        raise ValueError("--train false: no configuration has a seed that is finished")
    return done


if __name__ == "__main__":
    auto_cli(quality, as_positional=False)
