"""The study: trials in an Optuna database that several processes share, and that outlives them.

A trial is claimed by a lock on its folder, which its trainings inherit: a trial whose lock is free
and that has not ended was interrupted, and whoever claims it next goes on with it. Each trial has a
sampler of its own seed, so what a trial tries depends on the trials before it alone, and not on
interruptions.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import optuna
from filelock import BaseFileLock, FileLock
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from recsys.data.filesystem import whole_file
from recsys.search.space import Parameter, grid_of

DATABASE = "study.db"
LOCK = ".lock"
LOG = "log.txt"
NAME = "recsys"
ABOUT = "about"  # attribute of the study: its settings and hashes of its data
SEEDS_APART = 1_000_003
Sampler = Literal["tpe", "random", "grid"]


@dataclass(frozen=True)
class Claim:
    """A trial that this process runs.

    trial: Optuna's trial.
    folder: folder of its trainings and their log.
    log: the log, locked; a training's output.
    reported: number of intermediate values that the study has of it already.
    """

    trial: Trial
    folder: Path
    log: IO[str]
    reported: int

    @property
    def values(self) -> dict[str, Any]:
        """Values of the trial's parameters, as Optuna stores them."""
        return self.trial.params


class SearchStudy:
    """Trials of a search, in its folder; see `recsys.search.search.Request` for its settings."""

    def __init__(
        self, folder: Path, space: Sequence[Parameter], sampler: Sampler, seed: int, prunes: bool
    ) -> None:
        """Keep the settings; `begin` opens the database."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder, self.space, self.sampler, self.seed = folder, space, sampler, seed
        self.url = f"sqlite:///{(folder / DATABASE).absolute()}"
        self.pruner = optuna.pruners.MedianPruner() if prunes else optuna.pruners.NopPruner()

    def exists(self) -> bool:
        """Return whether the folder has the study."""
        return (self.folder / DATABASE).exists()

    def begin(self, about: Mapping[str, Any]) -> None:
        """Create the study, or check that it is the one in the folder; call it locked.

        Args:
            about: everything that its trials have in common, as JSON values by name.

        Raises:
            ValueError: the folder has a study of another kind; names the differences.
        """
        if not self.exists():
            with whole_file(self.folder / DATABASE) as partial:
                url = f"sqlite:///{partial}"
                study = optuna.create_study(storage=url, study_name=NAME, direction="maximize")
                for values in grid_of(self.space) if self.sampler == "grid" else ():
                    study.enqueue_trial(values)
                study.set_user_attr(ABOUT, about)
        self.storage = optuna.storages.RDBStorage(self.url)
        known, given = self._study(0).user_attrs[ABOUT], json.loads(json.dumps(about))
        if names := [name for name in {**known, **given} if known.get(name) != given.get(name)]:
            lines = [f"{name}: {known.get(name)}, now {given.get(name)}" for name in names[:3]]
            raise ValueError(
                f"{self.folder}: holds a search with other settings ({'; '.join(lines)}); give the "
                "same ones to go on with it, or another --out"
            )

    def claim(self, count: int) -> Claim | None:
        """Return an interrupted trial, or a new one if fewer than `count` have begun, or None."""
        with self.locked():
            for known in self.trials(TrialState.RUNNING):
                log = self._lock_of(known.number)
                if log is not None:
                    trial = Trial(self._study(known.number), known._trial_id)
                    return self._claim(trial, log, len(known.intermediate_values))
            begun = len(self.trials()) - len(self.trials(TrialState.WAITING))
            if begun >= count or (self.sampler == "grid" and not self.trials(TrialState.WAITING)):
                return None
            trial = self._study(begun).ask()
            log = self._lock_of(trial.number)
            assert log is not None, "only a claim locks a trial's folder"
            return self._claim(trial, log, 0)

    def _claim(self, trial: Trial, log: IO[str], reported: int) -> Claim:
        """Give the trial a value for each parameter; one that it has already stays."""
        for parameter in self.space:
            name, values = parameter.name, parameter.distribution
            if isinstance(values, CategoricalDistribution):
                trial.suggest_categorical(name, values.choices)
            elif isinstance(values, IntDistribution):
                trial.suggest_int(name, values.low, values.high, step=values.step, log=values.log)
            else:
                assert isinstance(values, FloatDistribution)
                trial.suggest_float(name, values.low, values.high, step=values.step, log=values.log)
        return Claim(trial, self.trial_folder(trial.number), log, reported)

    def end(self, claim: Claim, state: TrialState, value: float | None = None) -> FrozenTrial:
        """Record a trial's end; call it locked."""
        return self._study(0).tell(claim.trial.number, value, state)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the trials in some states, in their order; default: all."""
        return self._study(0).get_trials(deepcopy=False, states=states or None)

    def trial_folder(self, number: int) -> Path:
        """Return the folder of a trial."""
        return self.folder / "trials" / f"{number:04d}"

    def _study(self, number: int) -> optuna.Study:
        """Return the study with the sampler of a trial."""
        seed = self.seed * SEEDS_APART + number
        samplers = optuna.samplers
        kind = samplers.TPESampler if self.sampler == "tpe" else samplers.RandomSampler
        return optuna.load_study(
            storage=self.storage, study_name=NAME, sampler=kind(seed=seed), pruner=self.pruner
        )

    def _lock_of(self, number: int) -> IO[str] | None:
        """Return the locked log of a trial, or None if another process has it."""
        folder = self.trial_folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / LOG).open("a")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            return None
        return log

    def locked(self) -> BaseFileLock:
        """Return a context in which no other thread or process claims or ends a trial."""
        return FileLock(self.folder / LOCK)
