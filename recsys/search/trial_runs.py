"""Trains a trial: one `recsys train` process after another, for each dataset and seed.

While a run trains, its validations are passed to Optuna, which may prune the trial. A run that was
interrupted goes on from its last checkpoint, and a finished one is read.
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

from optuna.trial import TrialState

from recsys.config import Config, load_config
from recsys.distributed.job import environment_of_no_rank
from recsys.evaluation.model_selection import selection_score
from recsys.search.space import Parameter, words_of
from recsys.search.study import Claim
from recsys.search.validations import TRACKER, read_lines

POLL_SECONDS = 0.2


class SearchStopped(Exception):
    """The search was asked to end; its trials go on when it is started again."""


@dataclass(frozen=True)
class TrialEnd:
    """The end of a trial: its state and, if it is complete, its value, else the cause."""

    state: TrialState
    value: float | None = None
    cause: str = ""


@dataclass(frozen=True)
class TrialRuns:
    """Trains trials.

    recipe: resolved configuration that trials change.
    config: the same, read.
    space: the parameters.
    data: datasets; a trial's value is the mean over them.
    seeds: seeds of each dataset.
    nproc: ranks of each training.
    threads: threads of each rank; None: as the environment says.
    stop: set when the search is to end.
    """

    recipe: Path
    config: Config
    space: Sequence[Parameter]
    data: Sequence[str]
    seeds: Sequence[int]
    nproc: int
    threads: int | None
    stop: threading.Event

    def run(self, claim: Claim) -> TrialEnd:
        """Train all runs of a trial, unless it is pruned or one fails.

        Raises:
            SearchStopped: the search was asked to end.
        """
        words = words_of(self.space, claim.values)
        try:
            load_config(self.recipe, words)
        except ValueError as error:
            return TrialEnd(TrialState.FAIL, cause=str(error))
        runs = [(data, seed) for seed in self.seeds for data in self.data]
        scores: list[float] = []
        for number, (data, seed) in enumerate(runs):
            folder = claim.folder / f"run-{number}"
            command = [*self._command(folder, data, seed), *words]
            if not self._train(command, claim, folder, len(runs) == 1):
                return TrialEnd(TrialState.PRUNED)
            metrics = folder / "metrics.json"
            if not metrics.exists():
                return TrialEnd(TrialState.FAIL, cause=f"see {claim.folder / 'log.txt'}")
            report = json.loads(metrics.read_text())["valid"]
            score = selection_score(report, self.config.best_model_by)
            assert score is not None, "a run without a score of validation fails"
            scores.append(score)
            if len(runs) > 1 and _is_hopeless(claim, number, fmean(scores)):
                return TrialEnd(TrialState.PRUNED)
        return TrialEnd(TrialState.COMPLETE, fmean(scores))

    def _command(self, folder: Path, data: str, seed: int) -> list[str]:
        """Return the command of a training, without the trial's settings."""
        launcher = [sys.executable, "-m", "recsys.cli"]
        if self.nproc > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc-per-node", str(self.nproc), "-m", "recsys.cli"]
        trackers = json.dumps([*self.config.tracker, TRACKER])
        command = [*launcher, "train", "--config", str(self.recipe), "--data", data]
        return [*command, "--out", str(folder), "--seed", str(seed), "--tracker", trackers]

    def _train(self, command: list[str], claim: Claim, folder: Path, watches: bool) -> bool:
        """Train a run, unless it is finished; return False if the trial was pruned meanwhile.

        The process inherits the trial's lock with its output: if the search is killed, the trial
        is not claimed again before the orphan ends.
        """
        if (folder / "metrics.json").exists():
            return True
        environment = environment_of_no_rank()
        if self.threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))
        process = subprocess.Popen(command, stdout=claim.log, stderr=claim.log, env=environment)
        seen = 0
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
                if self.stop.is_set():
                    raise SearchStopped
                has_ended = process.poll() is not None
                lines = read_lines(folder) if watches else []
                for place in range(seen, len(lines)):
                    if _is_hopeless(claim, place, self._score(lines[place]["metrics"])):
                        return False
                seen = len(lines)
                if has_ended:
                    return True
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()

    def _score(self, metrics: dict[str, float]) -> float:
        """Return the score of a validation from its metrics as trackers name them."""
        named = {name.replace("_at_", "@"): value for name, value in metrics.items()}
        score = selection_score(named, self.config.best_model_by)
        assert score is not None, "a validation without a score ends its run"
        return score


def _is_hopeless(claim: Claim, place: int, score: float) -> bool:
    """Report an intermediate value, unless the study has it; return whether to prune the trial."""
    if place < claim.reported - 1:  # judged before an interruption
        return False
    if place >= claim.reported:
        claim.trial.report(score, place)
    return claim.trial.should_prune()
