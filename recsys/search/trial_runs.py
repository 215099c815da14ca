"""Trains a trial: one `recsys train` process after another, for each dataset and seed.

Validations are passed to Optuna, which may prune the trial. Interrupted runs go on.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import IO

from optuna import TrialPruned
from optuna.trial import Trial

from recsys.config import Config, load_config
from recsys.distributed.job import environment_of_no_rank
from recsys.evaluation.model_selection import selection_score
from recsys.search.space import Parameter, words_of
from recsys.search.validations import TRACKER, read_lines

POLL_SECONDS = 0.2


class SearchStopped(Exception):
    """The search was asked to end; its trials go on when it is started again."""


class TrialFailed(Exception):
    """A trial has no value; says why."""


@dataclass(frozen=True)
class Claim:
    """A trial that this process runs; the study has `num_reported` values of it already."""

    trial: Trial
    folder: Path
    log: IO[str]
    num_reported: int

    def report(self, place: int, score: float) -> None:
        """Report an intermediate value, unless the study has it.

        Raises:
            TrialPruned: the trial is worse than others.
        """
        if place < self.num_reported - 1:  # judged before an interruption
            return
        if place >= self.num_reported:
            self.trial.report(score, place)
        if self.trial.should_prune():
            raise TrialPruned


@dataclass(frozen=True)
class TrialRuns:
    """Trains trials until `stop` is set, with `threads` per rank (None: by the environment)."""

    recipe: Path
    config: Config
    space: Sequence[Parameter]
    data: Sequence[str]
    seeds: Sequence[int]
    nproc: int
    threads: int | None
    stop: threading.Event

    def run(self, claim: Claim) -> float:
        """Train all runs of a trial; return the mean of their scores.

        Raises:
            TrialPruned: the trial is worse than others.
            TrialFailed: the recipe does not accept its values, or a run fails.
            SearchStopped: the search was asked to end.
        """
        words = words_of(self.space, claim.trial.params)
        try:
            load_config(self.recipe, words)
        except ValueError as error:
            raise TrialFailed(str(error)) from error
        runs = [(data, seed) for seed in self.seeds for data in self.data]
        scores: list[float] = []
        for number, (data, seed) in enumerate(runs):
            folder = claim.folder / f"run-{number}"
            metrics = folder / "metrics.json"
            if not metrics.exists():
                command = [*self._command(folder, data, seed), *words]
                self._train(command, claim, folder if len(runs) == 1 else None)
            if not metrics.exists():
                raise TrialFailed(f"see {claim.folder / 'log.txt'}")
            scores.append(self._score(json.loads(metrics.read_text())["valid"]))
            if len(runs) > 1:
                claim.report(number, fmean(scores))
        return fmean(scores)

    def _command(self, folder: Path, data: str, seed: int) -> list[str]:
        launcher = [sys.executable, "-m", "recsys.cli"]
        if self.nproc > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc-per-node", str(self.nproc), "-m", "recsys.cli"]
        trackers = json.dumps([*self.config.tracker, TRACKER])
        command = [*launcher, "train", "--config", str(self.recipe), "--data", data]
        return [*command, "--out", str(folder), "--seed", str(seed), "--tracker", trackers]

    def _train(self, command: list[str], claim: Claim, watched: Path | None) -> None:
        environment = environment_of_no_rank()
        if self.threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))
        # It inherits the lock with its output: the orphan of a killed search keeps the claim.
        process = subprocess.Popen(command, stdout=claim.log, stderr=claim.log, env=environment)
        num_seen, has_ended = 0, False
        try:
            while not has_ended:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
                if self.stop.is_set():
                    raise SearchStopped
                has_ended = process.poll() is not None
                lines = [] if watched is None else read_lines(watched)
                for place in range(num_seen, len(lines)):
                    claim.report(place, self._score(lines[place]["metrics"]))
                num_seen = len(lines)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()

    def _score(self, metrics: dict[str, float]) -> float:
        """Return the score of a validation; trackers name `@` otherwise."""
        metric_values = {name.replace("_at_", "@"): value for name, value in metrics.items()}
        score = selection_score(metric_values, self.config.best_model_by)
        assert score is not None, "a validation without a score ends its run"
        return score
