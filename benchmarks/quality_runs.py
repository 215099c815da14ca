"""Trains many configurations for their test metrics: side by side, and none of them twice.

Each is a `recsys train` process of one rank and one thread. A run whose `metrics.json` is there is
read; one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parent.parent / "recsys" / "configs" / "movielens_multimodal.yaml"
BUDGET = ("--batch_size", "512", "--epochs", "3", "--validations_per_epoch", "2", "--patience", "3")


@dataclass(frozen=True)
class QualityRun:
    """One training run of a grid.

    name: of its folder, with the seed.
    overrides: settings besides those of the recipe and the budget.
    """

    name: str
    seed: int
    overrides: Sequence[str] = field(default=(), compare=False)

    def folder(self, out: Path) -> Path:
        return out / f"{self.name.lower().replace(' ', '_').replace(',', '')}-{self.seed}"


def train_all(
    runs: Sequence[QualityRun],
    data: str,
    out: Path,
    recipe: Path = RECIPE,
    jobs: int = 1,
    cache: Path | None = None,
) -> dict[QualityRun, dict[str, Any]]:
    """Test metrics of each run.

    Args:
        runs: what to train.
        data: dataset.
        out: folder of the runs.
        recipe: what the overrides apply to.
        jobs: how many train side by side.
        cache: folder of encoded items; default: the usual one.

    Raises:
        RuntimeError: a run failed; names its log. The others are finished first.
    """
    with ThreadPoolExecutor(jobs) as pool:
        done = [pool.submit(_train, run, data, out, recipe, cache) for run in runs]
    return {run: result.result() for run, result in zip(runs, done, strict=True)}


def _train(
    run: QualityRun, data: str, out: Path, recipe: Path, cache: Path | None
) -> dict[str, Any]:
    folder = run.folder(out)
    if not (folder / "metrics.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "recsys.cli", "train", "--config", str(recipe)]
        command += ["--data", data, "--out", str(folder), "--seed", str(run.seed), *BUDGET]
        command += ["--cache", str(cache)] if cache else []
        print(f"training {folder.name}", flush=True)
        log = folder / "log.txt"
        with log.open("a") as output:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*command, *run.overrides], stdout=output, stderr=output, env=environment
            )
        if done.returncode:
            raise RuntimeError(f"training {folder.name} failed; see {log}")
    return json.loads((folder / "metrics.json").read_text())["test"]
