"""Train many configurations for their test metrics: side by side, and none of them twice.

Each is a `recsys train` process of one rank and one thread. A finished run is read; an interrupted
run continues from its last checkpoint, and a run that another process trains is waited for.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT
from recsys.distributed.job import environment_of_no_rank

RECIPE = ROOT / "recsys" / "recipes" / "movielens_multimodal.yaml"


@dataclass(frozen=True)
class QualityRun:
    """One training run of a grid.

    name: name of its folder, before the seed.
    overrides: settings besides those of the recipe.
    """

    name: str
    seed: int
    overrides: Sequence[str] = field(default=(), compare=False)

    def folder(self, out: Path) -> Path:
        """Return the run's folder under `out`."""
        return out / f"{self.name.lower().replace(' ', '_').replace(',', '')}-{self.seed}"


@dataclass(frozen=True)
class Training:
    """A `recsys train` process.

    folder: folder of the run.
    data: dataset.
    recipe: the recipe that the overrides change.
    title: description of the run.
    leaves: files of the folder besides `metrics.json`; if one is missing, the run is repeated.
    """

    folder: Path
    data: str
    recipe: Path
    seed: int
    overrides: tuple[str, ...]
    title: str
    leaves: tuple[str, ...] = ()

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds the metrics and all `leaves`."""
        return all((self.folder / name).exists() for name in ("metrics.json", *self.leaves))

    def metrics(self) -> dict[str, Any]:
        """Read the metrics of the finished run."""
        return json.loads((self.folder / "metrics.json").read_text())


def train_all(
    runs: Sequence[QualityRun],
    data: str,
    out: Path,
    recipe: Path = RECIPE,
    jobs: int = 1,
    cache: Path | None = None,
) -> dict[QualityRun, dict[str, Any]]:
    """Train all runs and return the test metrics of each.

    Args:
        runs: runs to train.
        data: dataset.
        out: folder of the runs.
        recipe: the recipe that the overrides change.
        jobs: how many runs train side by side.
        cache: folder of encoded items; default: the usual one.

    Raises:
        RuntimeError: a run failed; names its log. The others are finished first.
    """
    trainings = {
        run: Training(run.folder(out), data, recipe, run.seed, tuple(run.overrides), run.name)
        for run in runs
    }
    finish(list(trainings.values()), jobs, cache)
    return {run: training.metrics()["test"] for run, training in trainings.items()}


def finish(trainings: Sequence[Training], jobs: int, cache: Path | None) -> None:
    """Train the runs that are not finished, `jobs` side by side, in their order.

    Raises:
        RuntimeError: a run failed; names its log. The others are finished first.
    """
    with ThreadPoolExecutor(jobs) as pool:
        done = [pool.submit(_train, training, cache) for training in trainings]
    for result in done:
        result.result()


def _train(training: Training, cache: Path | None) -> None:
    folder = training.folder
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    with log.open("a") as output:
        # The process that trains inherits the lock with its output, so that another study, or this
        # one started again while an orphan still trains, waits for the run instead of making it.
        fcntl.flock(output, fcntl.LOCK_EX)
        if training.is_finished:
            return
        print(f"training {training.title}, seed {training.seed}, in {folder}", flush=True)
        done = subprocess.run(
            _command(training, cache),
            stdout=output,
            stderr=output,
            env=environment_of_no_rank() | {"OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        raise RuntimeError(f"training {folder.name} failed; see {log}")


def _command(training: Training, cache: Path | None) -> list[str]:
    folder = training.folder
    command = [sys.executable, "-m", "recsys.cli", "train", "--config", str(training.recipe)]
    command += ["--data", training.data, "--out", str(folder), "--seed", str(training.seed)]
    command += ["--cache", str(cache)] if cache else []
    # Metrics are written last: a run that has them, but not the rest, is of an older version.
    command += ["--overwrite", "true"] if (folder / "metrics.json").exists() else []
    return [*command, *training.overrides]


def command_words(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return settings by full name as words of the command line.

    Example::

        command_words({"content": "none", "ranking.mlp_units": [8]})
        # ("--content", "none", "--ranking.mlp_units", "[8]")
    """
    return tuple(
        word
        for name, value in settings.items()
        for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    )
