"""The search: an Optuna study in a folder, shared by processes, whose trials are trainings.

A lock on a trial's log claims it; an interrupted trial is claimed again and goes on. Each trial has
a sampler of its own seed, so interruptions do not change what is tried.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import optuna
from filelock import FileLock
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from recsys.checkpoint.compatibility import flattened
from recsys.config import Config, load_config, save_config, to_plain
from recsys.data.items.item_column import FeatureFile
from recsys.data.parquet.file import footer_digest, open_parquet
from recsys.data.schema import load_schema
from recsys.search.space import Parameter, check_space, grid_of, words_of
from recsys.search.trial_runs import Claim, SearchStopped, TrialFailed, TrialRuns
from recsys.storage.files import whole_file
from recsys.storage.location import Location
from recsys.storage.output_file import check_run_folder

logger = logging.getLogger(__name__)

RECIPE, BEST, DATABASE, NAME = "recipe.yaml", "best.yaml", "study.db", "recsys"
# Settings that may differ from one command on the folder to the next: no result depends on them.
FREE = ("cache", "log_every_steps", "log_format", "log_level", "num_workers", "stall_timeout")
ABOUT = "about"  # attribute of the study: its settings and hashes of its data
SEEDS_APART = 1_000_003
FAILURES = 3  # trials that may fail before one is complete
WAIT_SECONDS = 1.0
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Request:
    """Numbers and rules of a search.

    trials: number of trials, those of earlier commands on the folder included.
    seeds: runs of each dataset, from the recipe's seed on.
    nproc: ranks of each training.
    prunes: stop trials that are worse than the median of others at the same validation.
    keeps: checkpoints to keep, those of the best trial or of all.
    """

    trials: int
    jobs: int = 1
    seeds: int = 1
    nproc: int = 1
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    prunes: bool = True
    keeps: Literal["best", "all"] = "best"


class Search:
    """A search in the folder `out`, of values in `space` for the recipe `config`.

    Raises:
        ValueError: a value of the space does not fit the recipe, or the folder holds a search with
            other settings or data.
    """

    def __init__(
        self,
        config: Config,
        space: Sequence[Parameter],
        data: Sequence[str],
        out: Path,
        request: Request,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.config, self.space, self.data, self.out = config, space, data, out
        self.request, self.stop = request, threading.Event()
        for dataset in data:
            check_run_folder(out, dataset)
        is_new = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        try:
            with self._locked():
                if not (out / DATABASE).exists():  # a recipe alone is of a refused search
                    self._create()
                self.storage = optuna.storages.RDBStorage(_url(out / DATABASE))
                self._require_same()
        except ValueError:
            if is_new:
                shutil.rmtree(out)
            raise

    def _create(self) -> None:
        names = sorted(path.name for path in self.out.iterdir() if path.name != RECIPE)
        if other_names := [name for name in names if not name.startswith(".")]:
            raise ValueError(
                f"{self.out}: holds '{other_names[0]}', but no search; choose another --out"
            )
        with whole_file(self.out / RECIPE) as partial:
            save_config(self.config, partial)
        check_space(self.space, self.out / RECIPE)
        with whole_file(self.out / DATABASE) as partial:
            study = optuna.create_study(
                storage=_url(partial), study_name=NAME, direction="maximize"
            )
            for values in grid_of(self.space) if self.request.sampler == "grid" else ():
                study.enqueue_trial(values)
            study.set_user_attr(ABOUT, self._about())

    def _about(self) -> dict[str, object]:
        """Return everything that the trials have in common, as JSON values by name."""
        plain = to_plain(self.config)
        settings = {name: value for name, value in plain.items() if name not in FREE}
        about = {
            **flattened(settings),
            **{f"space {p.name}": repr((p.distribution, p.sets)) for p in self.space},
            **{f"content of {data}": dataset_digest(Location.of(data)) for data in self.data},
            "--seeds": self.request.seeds,
            "--nproc": self.request.nproc,
            "--sampler": self.request.sampler,
            "--prune": self.request.prunes,
        }
        return dict(json.loads(json.dumps(about)))

    def _require_same(self) -> None:
        before, current = self._study(0).user_attrs[ABOUT], self._about()
        if names := [
            name for name in {**before, **current} if before.get(name) != current.get(name)
        ]:
            lines = [f"{name}: {before.get(name)}, now {current.get(name)}" for name in names[:3]]
            raise ValueError(
                f"{self.out}: holds a search with other settings ({'; '.join(lines)}); give the "
                "same ones to go on with it, or another --out"
            )

    def run(self) -> list[FrozenTrial]:
        """Run trials until as many as asked have ended; return the complete ones, the best first.

        Raises:
            SearchStopped: SIGTERM or SIGINT; the same command goes on.
            ValueError: the first trials all failed.
        """
        with self._stopped_by_signals(), ThreadPoolExecutor(self.request.jobs) as pool:
            workers = [pool.submit(self._work) for _ in range(self.request.jobs)]
        errors = [error for worker in workers if (error := worker.exception()) is not None]
        # A worker that fails stops the others: its error is the cause.
        for error in sorted(errors, key=lambda error: isinstance(error, SearchStopped)):
            raise error
        with self._locked():  # a search killed between a trial's end and this may lack it
            self._keep_best()
        return self.ranking()

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study(0).get_trials(deepcopy=False, states=states or None)

    def ranking(self) -> list[FrozenTrial]:
        return sorted(self.trials(TrialState.COMPLETE), key=lambda trial: -trial.values[0])

    def _work(self) -> None:
        """Run trials until none is left; wait for those of other processes."""
        jobs = self.request.jobs
        runs = TrialRuns(
            recipe=self.out / RECIPE,
            config=self.config,
            space=self.space,
            data=self.data,
            seeds=range(self.config.seed, self.config.seed + self.request.seeds),
            nproc=self.request.nproc,
            threads=None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs),
            stop=self.stop,
        )
        try:
            while not self.stop.is_set():
                if (claim := self._claim()) is not None:
                    with closing(claim.log):  # and with it the claim
                        self._run(claim, runs)
                elif self.trials(TrialState.RUNNING):
                    self.stop.wait(WAIT_SECONDS)
                else:
                    return
        except BaseException:
            self.stop.set()  # other workers end, too
            raise
        raise SearchStopped

    def _claim(self) -> Claim | None:
        """Return an interrupted trial, or a new one if too few have begun, or None."""
        with self._locked():
            for interrupted in self.trials(TrialState.RUNNING):
                if (log := self._lock_log(interrupted.number)) is not None:
                    trial = Trial(self._study(interrupted.number), interrupted._trial_id)
                    return self._suggested(trial, log, len(interrupted.intermediate_values))
            waiting = self.trials(TrialState.WAITING)
            number = len(self.trials()) - len(waiting)
            if number >= self.request.trials or (self.request.sampler == "grid" and not waiting):
                return None
            trial = self._study(number).ask()
            log = self._lock_log(trial.number)
            assert log is not None, "only a claim locks a trial's log"
            return self._suggested(trial, log, 0)

    def _suggested(self, trial: Trial, log: IO[str], num_reported: int) -> Claim:
        """Give the trial a value for each parameter; one that it has already stays."""
        for parameter in self.space:
            name, values = parameter.name, parameter.distribution
            if isinstance(values, CategoricalDistribution):
                trial.suggest_categorical(name, values.choices)
            elif isinstance(values, IntDistribution):
                trial.suggest_int(name, values.low, values.high, step=values.step, log=values.log)
            else:
                trial.suggest_float(name, values.low, values.high, step=values.step, log=values.log)
        return Claim(trial, self._folder_of(trial.number), log, num_reported)

    def _run(self, claim: Claim, runs: TrialRuns) -> None:
        """Run a trial and record its end; one with the values of a complete trial has its value."""
        equal = [t for t in self.trials(TrialState.COMPLETE) if t.params == claim.trial.params]
        state, value, cause = TrialState.COMPLETE, None, ""
        try:
            if equal:
                value, cause = equal[0].values[0], f"as trial {equal[0].number}"
            else:
                value = runs.run(claim)
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except TrialFailed as error:
            state, cause = TrialState.FAIL, str(error)
        with self._locked():
            self._study(0).tell(claim.trial.number, value, state)
            ended, best = self.trials(*ENDED), self._keep_best()
        logger.info(
            "trial %d: %s%s; %d of %d ended%s",
            claim.trial.number,
            state.name.lower() if value is None else f"{value:.4f}",
            f" ({cause})" if cause else "",
            len(ended),
            self.request.trials,
            f", best {best.values[0]:.4f} of trial {best.number}" if best is not None else "",
        )
        if len(ended) >= min(FAILURES, self.request.trials) and all(
            trial.state == TrialState.FAIL for trial in ended
        ):
            raise ValueError(
                f"{self.out}: the first {len(ended)} trials failed, the last one so: {cause}"
            )

    def _keep_best(self) -> FrozenTrial | None:
        """Write the best configuration and drop checkpoints of other trials; call it locked."""
        best = next(iter(self.ranking()), None)
        if best is not None:
            config = load_config(self.out / RECIPE, words_of(self.space, best.params))
            with whole_file(self.out / BEST) as partial:
                save_config(config, partial)
        for trial in self.trials(*ENDED) if self.request.keeps == "best" else ():
            if best is None or trial.number != best.number:
                for run in self._folder_of(trial.number).glob("run-*"):
                    shutil.rmtree(run / "checkpoints", ignore_errors=True)
        return best

    def _study(self, number: int) -> optuna.Study:
        samplers, pruners = optuna.samplers, optuna.pruners
        sampler = samplers.TPESampler if self.request.sampler == "tpe" else samplers.RandomSampler
        return optuna.load_study(
            storage=self.storage,
            study_name=NAME,
            sampler=sampler(seed=self.config.seed * SEEDS_APART + number),
            pruner=pruners.MedianPruner() if self.request.prunes else pruners.NopPruner(),
        )

    def _folder_of(self, number: int) -> Path:
        return self.out / "trials" / f"{number:04d}"

    def _lock_log(self, number: int) -> IO[str] | None:
        """Return the locked log of a trial, or None if another process has it."""
        folder = self._folder_of(number)
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / "log.txt").open("a")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            return None
        return log

    def _locked(self) -> FileLock:
        """Return a context in which no other thread or process claims or ends a trial."""
        return FileLock(self.out / ".lock")

    @contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT end the search inside the block."""
        numbers = signal.SIGTERM, signal.SIGINT
        before = [signal.signal(number, lambda *_: self.stop.set()) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def _url(database: Path | str) -> str:
    return f"sqlite:///{Path(database).absolute()}"


def dataset_digest(data: Location) -> str:
    """Return a hash of a dataset: schema, footers of Parquet files, and content of .npy files."""
    digest = hashlib.blake2b((data / "schema.yaml").read_bytes(), digest_size=16)
    for split in ("train", "valid", "items", "vocabulary"):
        for file in (data / split).files(".parquet"):
            with open_parquet(file) as parquet:
                digest.update(f"{split} {footer_digest(file, parquet)}".encode())
    items = load_schema(data, with_vocabularies=False).items
    for column in items.columns.values() if items is not None else ():
        if column.file is not None:
            digest.update(FeatureFile(data / column.file).fingerprint().encode())
        if column.ids is not None:
            digest.update((data / column.ids).read_bytes())
    return digest.hexdigest()
