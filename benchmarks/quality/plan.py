"""Plan the runs of a study: every configuration, with every seed, on every dataset.

A run's folder is `OUT/DATASET/DIGEST-SEED`, by a digest of the resolved configuration and of the
location of the data. So another recipe makes other runs, and configurations that are equal under
different names are trained once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.quality.cells import Settings
from benchmarks.quality.runs import Training, command_words
from recsys.config import load_config, to_plain
from recsys.data.filesystem import Location
from recsys.evaluation.scores import scores_file

Plan = dict[str, list[list[Training]]]  # by name of the configuration: [seeds][datasets]


def plan_runs(
    named: Mapping[str, Settings], datasets: Mapping[str, str], out: Path, recipe: Path, seeds: int
) -> Plan:
    """Return the runs of each configuration.

    Args:
        named: changes to the recipe by name.
        datasets: locations by name, as from `windows`.
        out: folder of the runs.
        recipe: the recipe that is changed.
        seeds: number of seeds, from 0.

    Raises:
        ValueError: a configuration does not resolve; names it.
    """
    plan: Plan = {}
    for name, settings in named.items():
        try:
            configuration = resolved(recipe, settings)
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from error
        plan[name] = [
            [
                _training(name, settings, configuration, dataset, place, out, recipe, seed)
                for dataset, place in datasets.items()
            ]
            for seed in range(seeds)
        ]
    return plan


def _training(
    name: str,
    settings: Settings,
    configuration: dict[str, Any],
    dataset: str,
    place: str,
    out: Path,
    recipe: Path,
    seed: int,
) -> Training:
    about = json.dumps([configuration, place], sort_keys=True)
    folder = out / dataset / f"{sha256(about.encode()).hexdigest()[:10]}-{seed}"
    leaves = (scores_file(folder, "test").name,)
    title = f"{name} on {dataset}"
    return Training(folder, place, recipe, seed, command_words(settings), title, leaves)


def resolved(recipe: Path, settings: Settings) -> dict[str, Any]:
    """Resolve a recipe with these settings; the folder of encoded items is left out.

    Raises:
        ValueError: a setting is unknown, or does not fit the others.
    """
    configuration: dict[str, Any] = to_plain(load_config(recipe, list(command_words(settings))))
    del configuration["cache"]
    return configuration


def in_order(plan: Plan) -> list[Training]:
    """Return each run once, seed by seed, so that a study stopped early has all of some seeds."""
    num_seeds = max((len(of_seeds) for of_seeds in plan.values()), default=0)
    runs: dict[Path, Training] = {}
    for seed in range(num_seeds):
        for of_seeds in plan.values():
            runs |= {run.folder: run for run in of_seeds[seed] if run.folder not in runs}
    return list(runs.values())


def finished(plan: Plan) -> Plan:
    """Keep the seeds finished on all datasets; configurations without any are left out."""
    kept = {
        name: [of_data for of_data in of_seeds if all(run.is_finished for run in of_data)]
        for name, of_seeds in plan.items()
    }
    return {name: of_seeds for name, of_seeds in kept.items() if of_seeds}


def windows(data: str) -> dict[str, str]:
    """Return the datasets of a folder by name: itself, or those of its windows in their order.

    Args:
        data: a dataset, or a folder of datasets `window-1`, `window-2` ... as
            `recsys prepare movielens --split rolling` makes it.

    Raises:
        ValueError: it is neither.
    """
    root = Location.of(data)
    if (root / "schema.yaml").exists():
        return {root.path.rsplit("/", 1)[-1]: str(root)}
    found = {
        int(match[1]): path.parent
        for path in Path(root.path).glob("window-*/schema.yaml")
        if (match := re.fullmatch(r"window-(\d+)", path.parent.name))
    }
    if not found:
        raise ValueError(
            f"--data {data}: has neither a schema.yaml nor folders window-1, window-2 ... that "
            "have; make one with `recsys prepare movielens`"
        )
    return {found[number].name: str(found[number]) for number in sorted(found)}
