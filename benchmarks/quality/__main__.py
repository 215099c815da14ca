"""The quality study: the gain of each part of the model, with one budget for all.

    python -m benchmarks.quality --data DATA --out runs/quality --grid full --seeds 3

Trains the cells of a grid (`benchmarks.quality.grid`) with several seeds, on a dataset or on all
windows of a rolling split. Finished runs are not trained again.
"""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import auto_cli

from benchmarks.quality.grid import Cell, chosen_cells
from benchmarks.quality.history_lengths import history_table
from benchmarks.quality.runs import RECIPE, Plan, finish, finished, in_order, plan_runs, windows
from benchmarks.quality.study import Study, read_results, write_study
from benchmarks.results import RESULTS, provenance
from benchmarks.timing.ranks import is_launched


def quality(
    data: str,
    out: Path,
    seeds: int = 3,
    first_seed: int = 0,
    grid: str = "parts",
    only: list[str] | None = None,
    jobs: int = 1,
    cache: Path | None = None,
    recipe: Path = RECIPE,
    results: Path | None = None,
    train: bool = True,
) -> None:
    """Train the unfinished runs, and write the results of all finished ones.

    Args:
        data: a dataset, or a folder of its windows, which are pooled.
        out: folder of the runs.
        seeds: runs per cell and dataset.
        first_seed: seed of the first run; the others follow it.
        grid: parts, history, text, backbones, full, or ifdb (with the recipe ifdb).
        only: cells of the grid by name; default: all.
        jobs: how many runs train side by side, one thread each.
        cache: folder of encoded items; default: the usual one.
        recipe: the recipe that cells change.
        results: files to write, without their ending; default: benchmarks/results/quality.
        train: false only writes the results of the finished runs, even if incomplete.

    Raises:
        ValueError: a name, setting or dataset is invalid.
        RuntimeError: a run failed; names its log.
    """
    if min(seeds, jobs) < 1:
        raise ValueError(f"--seeds {seeds} --jobs {jobs}: both must be at least 1")
    if first_seed < 0:
        raise ValueError(f"--first_seed {first_seed}: must be at least 0")
    if is_launched():
        raise ValueError("quality starts its runs itself; use --nproc 1, and --jobs for more")
    datasets = windows(data)
    cells = chosen_cells(grid, only)
    settings = {cell.name: cell.settings for cell in cells}
    plan = plan_runs(settings, datasets, out, recipe, range(first_seed, first_seed + seeds))
    _require_effects(cells, plan)
    files = results or RESULTS / "quality"
    cell_results = read_results(cells, _trained(plan, jobs, cache, train))
    length_table = history_table(cell_results)
    tables = () if length_table is None else (length_table,)
    write_study(Study(cell_results, list(datasets), provenance(), tables), files)
    print(files.with_name(f"{files.name}.md").read_text())


def _require_effects(cells: Sequence[Cell], plan: Plan) -> None:
    folders = {name: runs[0][0].folder for name, runs in plan.items()}
    for cell in cells:
        if cell.baseline in folders and folders[cell.name] == folders[cell.baseline]:
            raise ValueError(
                f"'{cell.name}' changes nothing of '{cell.baseline}' with this recipe; change the "
                "recipe (a contrastive.weight of 0 leaves no CIC to compare) or leave the cell "
                "out with --only"
            )


def _trained(plan: Plan, jobs: int, cache: Path | None, train: bool) -> Plan:
    if train:
        finish(in_order(plan), jobs, cache)
    finished_runs = finished(plan)
    if not finished_runs:
        raise ValueError("--train false: no configuration has a seed that is finished")
    return finished_runs


if __name__ == "__main__":
    auto_cli(quality, as_positional=False)
