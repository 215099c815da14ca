"""The search: an Optuna study in a folder that processes share; each trial trains models.

A process claims a trial by a lock on its log. An interrupted trial returns to the study's queue and
its runs resume. Each trial's sampler has its own seed, so interruptions do not change its values.
"""

import fcntl
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import IO, Literal

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from recsys.checkpoint.compatibility import flattened
from recsys.config import Config, load_config, save_config, to_plain
from recsys.data.items.item_table import FeatureFile
from recsys.data.parquet.file import open_parquet, rows_digest
from recsys.data.schema import load_schema
from recsys.data.transforms.chain import FILE as FITS
from recsys.distributed.job import environment_without_rank
from recsys.evaluation.model_selection import selection_score
from recsys.search.space import Parameter, arguments_of, check_space, grid_of
from recsys.search.validations import TRACKER, read_lines
from recsys.storage.files import atomic_file
from recsys.storage.location import Location
from recsys.storage.output_file import check_run_folder

logger = logging.getLogger(__name__)

RECIPE, BEST, DATABASE, NAME = "recipe.yaml", "best.yaml", "study.db", "recsys"
# Settings that may change when a search is resumed: no result depends on them.
FREE = ("cache", "log_every_steps", "log_format", "log_level", "num_workers", "stall_timeout")
METADATA = "about"  # attribute of the study: its settings and hashes of its data
SEED_STRIDE = 1_000_003  # distance of the samplers' seeds between two seeds of the recipe
FAILURES = 3  # the search stops if this many trials have failed and no other has ended
WAIT_SECONDS, POLL_SECONDS = 1.0, 0.2
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class SearchStopped(Exception):
    """Raised when a signal stops the search; its trials resume when it is started again."""


@dataclass
class Search:
    """A search in the folder `out` for the best values in `space` of the recipe `config`.

    Raises a ValueError for a value that the recipe refuses, or a folder of another search.
    """

    config: Config
    space: Sequence[Parameter]
    data: Sequence[str]
    out: Path
    num_trials: int  # including trials of earlier commands on the folder
    jobs: int = 1
    seeds: int = 1  # runs of each dataset, from the recipe's seed on
    nproc: int = 1  # ranks of each training
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    prunes: bool = True  # stop trials worse than the median of others at the same validation
    keep_checkpoints: Literal["best", "all"] = "best"

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", "The reported value is ignored")  # of a resumed trial
        self.stop = threading.Event()
        for dataset in self.data:
            check_run_folder(self.out, dataset)
        with TemporaryDirectory() as folder:  # a refused space leaves nothing in `out`
            save_config(self.config, Path(folder) / RECIPE)
            check_space(self.space, Path(folder) / RECIPE)
        grid = grid_of(self.space) if self.sampler == "grid" else []
        self.out.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if not (self.out / DATABASE).exists():
                self._create(grid)
            database = (self.out / DATABASE).absolute()
            self.storage = optuna.storages.RDBStorage(f"sqlite:///{database}")
            self._require_same()

    def _create(self, grid: Sequence[dict[str, object]]) -> None:
        names = sorted(path.name for path in self.out.iterdir() if path.name != RECIPE)
        if other_names := [name for name in names if not name.startswith(".")]:
            raise ValueError(
                f"{self.out}: holds '{other_names[0]}', but no search; choose another --out"
            )
        with atomic_file(self.out / RECIPE) as partial:
            save_config(self.config, partial)
        with atomic_file(self.out / DATABASE) as partial:
            url = f"sqlite:///{partial.absolute()}"
            study = optuna.create_study(storage=url, study_name=NAME, direction="maximize")
            for values in grid:
                study.enqueue_trial(values)
            study.set_user_attr(METADATA, self._metadata())

    def _metadata(self) -> dict[str, object]:
        """Return all settings that trials share, and hashes of the data, as JSON values by name."""
        plain = to_plain(self.config)
        metadata = flattened({name: value for name, value in plain.items() if name not in FREE})
        metadata |= {f"space {p.name}": repr((p.distribution, p.sets)) for p in self.space}
        metadata |= {f"content of {data}": dataset_digest(Location.of(data)) for data in self.data}
        metadata |= {"--seeds": self.seeds, "--nproc": self.nproc}
        metadata |= {"--sampler": self.sampler, "--prune": self.prunes}
        return dict(json.loads(json.dumps(metadata)))

    def _require_same(self) -> None:
        saved, current = self._study(0).user_attrs[METADATA], self._metadata()
        names = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
        if names:
            lines = [f"{name}: {saved.get(name)}, now {current.get(name)}" for name in names[:3]]
            raise ValueError(
                f"{self.out}: holds a search with other settings ({'; '.join(lines)}); give the "
                "same ones to go on with it, or another --out"
            )

    def run(self) -> list[FrozenTrial]:
        """Run trials until `num_trials` have ended; return the complete ones, the best first.

        SIGTERM and SIGINT raise SearchStopped; the same command resumes the search. A ValueError
        if the first `FAILURES` trials, or all trials, failed.
        """
        numbers = signal.SIGTERM, signal.SIGINT
        handlers = [signal.signal(number, lambda *_: self.stop.set()) for number in numbers]
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                workers = [pool.submit(self._work) for _ in range(self.jobs)]
        finally:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)
        for worker in workers:
            worker.result()
        if self.stop.is_set():
            raise SearchStopped
        with self._locked():  # an earlier command may have been killed before it wrote the best
            best = self._keep_best()
        if best is None:
            raise ValueError(f"{self.out}: no trial is complete; see {self.out}/trials/*/log.txt")
        return self.ranking()

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study(0).get_trials(deepcopy=False, states=states or None)

    def ranking(self) -> list[FrozenTrial]:
        return sorted(self.trials(TrialState.COMPLETE), key=lambda trial: -trial.values[0])

    def _work(self) -> None:
        """Run trials until none is left or the search stops; wait for other processes' trials."""
        try:
            while not self.stop.is_set():
                if (claim := self._claim()) is not None:
                    trial, log = claim
                    with log, suppress(SearchStopped):  # closing the log ends the claim
                        self._run(trial, log)
                elif self.trials(TrialState.RUNNING):
                    self.stop.wait(WAIT_SECONDS)
                else:
                    return
        except BaseException:
            self.stop.set()  # ends the other workers
            raise

    def _claim(self) -> tuple[Trial, IO[str]] | None:
        """Return an interrupted or new trial with its locked log, or None if none is left."""
        with self._locked():
            for trial in self.trials(TrialState.RUNNING):
                if (log := self._lock_log(trial.number)) is not None:  # its process has ended
                    log.close()
                    self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
            waiting = [trial.number for trial in self.trials(TrialState.WAITING)]
            number = min(waiting, default=len(self.trials()))
            if number >= self.num_trials or (self.sampler == "grid" and not waiting):
                return None
            space: dict[str, BaseDistribution] = {p.name: p.distribution for p in self.space}
            claimed = self._study(number).ask(space)  # an interrupted trial keeps its values
            claimed_log = self._lock_log(claimed.number)
            assert claimed_log is not None, "only a claim locks a trial's log"
            return claimed, claimed_log

    def _run(self, trial: Trial, log: IO[str]) -> None:
        """Run a trial and record its result, or copy that of a complete trial of equal values."""
        state, value, cause = TrialState.COMPLETE, None, ""
        equal = [t for t in self.trials(TrialState.COMPLETE) if t.params == trial.params]
        try:
            if equal:
                value, cause = equal[0].values[0], f"as trial {equal[0].number}"
            else:
                value = self._score_of(trial, log)
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except ValueError as error:
            state, cause = TrialState.FAIL, str(error)
        with self._locked():
            self._study(0).tell(trial.number, value, state)
            ended, best = self.trials(*ENDED), self._keep_best()
        result = state.name.lower() if value is None else f"{abs(value):.4f}"  # errors are negative
        result += f" ({cause})" if cause else ""
        progress = f"{len(ended)} of {self.num_trials} ended"
        if best is not None:
            progress += f", best {abs(best.values[0]):.4f} of trial {best.number}"
        logger.info("trial %d: %s; %s", trial.number, result, progress)
        all_failed = all(trial.state == TrialState.FAIL for trial in ended)
        if all_failed and len(ended) >= min(FAILURES, self.num_trials):
            raise ValueError(
                f"{self.out}: the first {len(ended)} trials failed, the last one so: {cause}"
            )

    def _score_of(self, trial: Trial, log: IO[str]) -> float:
        """Train all runs of a trial and return their mean score; TrialPruned if it is pruned."""
        arguments, folder = arguments_of(self.space, trial.params), self._folder_of(trial.number)
        config = load_config(self.out / RECIPE, arguments)
        seeds = range(config.seed, config.seed + self.seeds)
        # After the trial's own settings, which may name a seed or trackers.
        arguments += ["--tracker", json.dumps([*config.tracker, TRACKER])]
        runs = [(data, seed) for seed in seeds for data in self.data]
        scores: list[float] = []
        for number, (data, seed) in enumerate(runs):
            run = folder / f"run-{number}"
            metrics = run / "metrics.json"
            if not metrics.exists():
                command = [*self._command(run, data), *arguments, "--seed", str(seed)]
                self._train(command, log, trial, run, len(runs))
            if not metrics.exists():
                raise ValueError(f"see {folder / 'log.txt'}")
            scores.append(self._score(json.loads(metrics.read_text())["valid"]))
            if len(runs) > 1:
                _report(trial, number, fmean(scores))
        return fmean(scores)

    def _command(self, run: Path, data: str) -> list[str]:
        launcher = [sys.executable, "-m"]
        if self.nproc > 1:
            launcher += ["torch.distributed.run", "--standalone"]
            launcher += ["--nproc-per-node", str(self.nproc), "-m"]
        command = [*launcher, "recsys.cli", "train", "--config", str(self.out / RECIPE)]
        return [*command, "--data", data, "--out", str(run)]

    def _train(
        self, command: list[str], log: IO[str], trial: Trial, run: Path, num_runs: int
    ) -> None:
        """Run a training; if it is its trial's only run, report each validation to Optuna."""
        environment = environment_without_rank()
        if self.jobs > 1:
            threads = max(1, (os.cpu_count() or 1) // self.jobs)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        # The process inherits the locked log, so it holds the claim even if the search is killed.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        num_reported, has_ended = 0, False
        try:
            while not has_ended:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
                if self.stop.is_set():
                    raise SearchStopped
                has_ended = process.poll() is not None
                lines = read_lines(run) if num_runs == 1 else []
                for step in range(num_reported, len(lines)):
                    _report(trial, step, self._score(lines[step]["metrics"]))
                num_reported = len(lines)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()

    def _score(self, metrics: dict[str, float]) -> float:
        """Return the score of a validation, whose metrics have trackers' `_at_` instead of `@`."""
        metrics = {name.replace("_at_", "@"): value for name, value in metrics.items()}
        score = selection_score(metrics, self.config.best_model_by)
        assert score is not None, "a validation without a score ends its run"
        return score

    def _keep_best(self) -> FrozenTrial | None:
        """Write the best configuration and delete other trials' checkpoints; call with the lock."""
        best = next(iter(self.ranking()), None)
        if best is not None:
            config = load_config(self.out / RECIPE, arguments_of(self.space, best.params))
            with atomic_file(self.out / BEST) as partial:
                save_config(config, partial)
        for trial in self.trials(*ENDED) if self.keep_checkpoints == "best" else ():
            if best is None or trial.number != best.number:
                for run in self._folder_of(trial.number).glob("run-*"):
                    rmtree(run / "checkpoints", ignore_errors=True)
        return best

    def _study(self, number: int) -> optuna.Study:
        samplers, pruners = optuna.samplers, optuna.pruners
        kind = samplers.TPESampler if self.sampler == "tpe" else samplers.RandomSampler
        sampler = kind(seed=self.config.seed * SEED_STRIDE + number)
        pruner = pruners.MedianPruner() if self.prunes else pruners.NopPruner()
        return optuna.load_study(
            storage=self.storage, study_name=NAME, sampler=sampler, pruner=pruner
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


def _report(trial: Trial, step: int, score: float) -> None:
    """Report an intermediate score to Optuna; raise TrialPruned if the trial is to stop."""
    trial.report(score, step)
    if trial.should_prune():
        raise optuna.TrialPruned


def dataset_digest(data: Location) -> str:
    """Return a hash of a dataset: schema, fitted transforms, Parquet rows, .npy files."""
    digest = hashlib.blake2b((data / "schema.yaml").read_bytes(), digest_size=16)
    if (fits := data / FITS).exists():
        digest.update(fits.read_bytes())
    schema = load_schema(data, with_vocabularies=False)
    labels = schema.file_columns([*schema.of_kind("label"), *schema.of_kind("weight")])
    for split in ("train", "valid", "items", "vocabulary"):
        for file in (data / split).files(".parquet"):
            with open_parquet(file) as parquet:
                digest.update(f"{split} {rows_digest(file, parquet, labels)}".encode())
    items = schema.items
    for column in items.columns.values() if items is not None else ():
        if column.file is not None:
            digest.update(FeatureFile(data / column.file).fingerprint().encode())
        if column.ids is not None:
            digest.update((data / column.ids).read_bytes())
    return digest.hexdigest()
