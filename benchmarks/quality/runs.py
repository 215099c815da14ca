"""The runs of a study: every configuration, with every seed, on every dataset, each trained once.

Each is a `recsys train` process of one rank and one thread in `OUT/DATASET/DIGEST-SEED`. Finished
runs are read, interrupted runs continue, and runs of another process are waited for.
"""

import fcntl
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.quality.grid import Settings
from benchmarks.results import ROOT
from recsys.config import load_config, to_plain
from recsys.distributed.job import environment_without_rank
from recsys.evaluation.scores import scores_file
from recsys.storage.location import Location

RECIPE = ROOT / "recsys" / "recipes" / "movielens_multimodal.yaml"


@dataclass(frozen=True)
class Training:
    """A `recsys train` process in `folder`.

    required_files: besides `metrics.json`; if one is missing, the run is repeated.
    """

    folder: Path
    data: str
    recipe: Path
    seed: int
    overrides: tuple[str, ...]
    title: str
    required_files: tuple[str, ...] = ()

    @property
    def is_finished(self) -> bool:
        return all((self.folder / name).exists() for name in ("metrics.json", *self.required_files))

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.folder / "metrics.json").read_text())


def finish(trainings: Sequence[Training], jobs: int, cache: Path | None) -> None:
    """Train the runs that are not finished, `jobs` side by side, in their order.

    Raises:
        RuntimeError: a run failed; names its log. The others are finished first.
    """
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_train, training, cache) for training in trainings]
    for result in futures:
        result.result()


def _train(training: Training, cache: Path | None) -> None:
    folder = training.folder
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    with log.open("a") as output:
        # The training inherits the lock with its output, so that another study waits for an orphan.
        fcntl.flock(output, fcntl.LOCK_EX)
        if training.is_finished:
            return
        print(f"training {training.title}, seed {training.seed}, in {folder}", flush=True)
        process = subprocess.run(
            _command(training, cache),
            stdout=output,
            stderr=output,
            env=environment_without_rank() | {"OMP_NUM_THREADS": "1"},
        )
    if process.returncode:
        raise RuntimeError(f"training {folder.name} failed; see {log}")


def _command(training: Training, cache: Path | None) -> list[str]:
    folder = training.folder
    command = [sys.executable, "-m", "recsys.cli", "train", "--config", str(training.recipe)]
    command += ["--data", training.data, "--out", str(folder), "--seed", str(training.seed)]
    command += ["--cache", str(cache)] if cache else []
    # Metrics are written last: a run that has them, but not the rest, is of an older version.
    command += ["--overwrite", "true"] if (folder / "metrics.json").exists() else []
    return [*command, *training.overrides]


def command_arguments(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return settings by full name as command-line arguments."""
    return tuple(
        argument
        for name, value in settings.items()
        for argument in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    )


Plan = dict[str, list[list[Training]]]  # by name of the configuration: [seeds][datasets]


def plan_runs(
    changes: Mapping[str, Settings],
    datasets: Mapping[str, str],
    out: Path,
    recipe: Path,
    seeds: Sequence[int],
) -> Plan:
    """Return the runs of each configuration, one per seed and dataset.

    Raises:
        ValueError: a configuration does not resolve; names it.
    """
    plan: Plan = {}
    for name, settings in changes.items():
        try:
            configuration = resolved(recipe, settings)
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from error
        plan[name] = [
            [
                _training(name, settings, configuration, dataset, path, out, recipe, seed)
                for dataset, path in datasets.items()
            ]
            for seed in seeds
        ]
    return plan


def _training(
    name: str,
    settings: Settings,
    configuration: dict[str, Any],
    dataset: str,
    path: str,
    out: Path,
    recipe: Path,
    seed: int,
) -> Training:
    identity = json.dumps([configuration, path], sort_keys=True)
    folder = out / dataset / f"{sha256(identity.encode()).hexdigest()[:10]}-{seed}"
    required_files = (scores_file(folder, "test").name,)
    title = f"{name} on {dataset}"
    return Training(folder, path, recipe, seed, command_arguments(settings), title, required_files)


def resolved(recipe: Path, settings: Settings) -> dict[str, Any]:
    """Resolve a recipe with these settings; the folder of encoded items is left out.

    Raises:
        ValueError: a setting is unknown, or does not fit the others.
    """
    configuration: dict[str, Any] = to_plain(load_config(recipe, list(command_arguments(settings))))
    del configuration["cache"]
    return configuration


def in_order(plan: Plan) -> list[Training]:
    """Return each run once, seed by seed, so that a study stopped early has all of some seeds."""
    num_seeds = max((len(by_seed) for by_seed in plan.values()), default=0)
    runs: dict[Path, Training] = {}
    for position in range(num_seeds):
        for by_seed in plan.values():
            runs |= {run.folder: run for run in by_seed[position] if run.folder not in runs}
    return list(runs.values())


def finished(plan: Plan) -> Plan:
    """Keep the seeds finished on all datasets; configurations without any are left out."""
    complete = {
        name: [runs for runs in by_seed if all(run.is_finished for run in runs)]
        for name, by_seed in plan.items()
    }
    return {name: by_seed for name, by_seed in complete.items() if by_seed}


def windows(data: str) -> dict[str, str]:
    """Return a dataset, or those in the folders `window-1`, `window-2` ..., by name.

    Raises:
        ValueError: it is neither.
    """
    root = Location.of(data)
    if (root / "schema.yaml").exists():
        return {root.path.rsplit("/", 1)[-1]: str(root)}
    by_number = {
        int(match[1]): path.parent
        for path in Path(root.path).glob("window-*/schema.yaml")
        if (match := re.fullmatch(r"window-(\d+)", path.parent.name))
    }
    if not by_number:
        raise ValueError(
            f"--data {data}: has neither a schema.yaml nor folders window-1, window-2 ... that "
            "have; make one with `recsys prepare movielens`"
        )
    return {by_number[number].name: str(by_number[number]) for number in sorted(by_number)}
