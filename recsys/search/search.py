"""The search: claims trials, trains them, records their ends, and writes the best configuration."""

from __future__ import annotations

import hashlib
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
from typing import Literal

from optuna.trial import FrozenTrial, TrialState

from recsys.checkpoint.compatibility import flattened
from recsys.config import Config, load_config, save_config, to_plain
from recsys.data.filesystem import Location, whole_file
from recsys.data.items.item_column import FeatureFile
from recsys.data.parquet.file import footer_digest, open_parquet
from recsys.data.schema import load_schema
from recsys.search.space import Parameter, check_space, words_of
from recsys.search.study import Claim, Sampler, SearchStudy
from recsys.search.trial_runs import SearchStopped, TrialEnd, TrialRuns
from recsys.storage.output_file import check_run_folder

logger = logging.getLogger(__name__)

RECIPE, BEST = "recipe.yaml", "best.yaml"
# Settings that may differ from one command on the folder to the next: no result depends on them.
FREE = ("cache", "log_every_steps", "log_format", "log_level", "num_workers", "stall_timeout")
FAILURES = 3  # trials that may fail before one is complete
WAIT_SECONDS = 1.0
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Request:
    """Numbers and rules of a search.

    trials: number of trials, those of earlier commands on the folder included.
    jobs: trials side by side.
    seeds: runs of each dataset, from the recipe's seed on.
    nproc: ranks of each training.
    sampler: rule that proposes values.
    prunes: stop trials that are worse than the median of others at the same validation.
    keeps: checkpoints to keep, those of the best trial or of all.
    """

    trials: int
    jobs: int = 1
    seeds: int = 1
    nproc: int = 1
    sampler: Sampler = "tpe"
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
        """Check the space, and create or open the study."""
        self.config, self.space, self.data, self.out = config, space, data, out
        self.request, self.stop = request, threading.Event()
        settings = {name: of for name, of in to_plain(config).items() if name not in FREE}
        about = {
            **flattened(settings),
            **{f"space {one.name}": repr((one.distribution, one.sets)) for one in space},
            **{f"content of {one}": dataset_digest(Location.of(one)) for one in data},
            "--seeds": request.seeds,
            "--nproc": request.nproc,
            "--sampler": request.sampler,
            "--prune": request.prunes,
        }
        self.study = SearchStudy(out, space, request.sampler, config.seed, request.prunes)
        self._open(about)

    def _open(self, about: dict[str, object]) -> None:
        """Create the folder with recipe and study, or open the study that it holds."""
        for data in self.data:
            check_run_folder(self.out, data)
        is_new = not self.out.exists()
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            with self.study.locked():
                if not self.study.exists():  # a recipe without a study is of a refused search
                    self._refuse_other_files()
                    with whole_file(self.out / RECIPE) as partial:
                        save_config(self.config, partial)
                check_space(self.space, self.out / RECIPE)
                self.study.begin(about)
        except ValueError:
            if is_new:
                shutil.rmtree(self.out)
            raise

    def _refuse_other_files(self) -> None:
        """Raise a ValueError if the folder holds files of anything but a search."""
        others = [path.name for path in self.out.iterdir() if path.name != RECIPE]
        if others := sorted(name for name in others if not name.startswith(".")):
            raise ValueError(
                f"{self.out}: holds '{others[0]}', but no search; choose another --out"
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
        with self.study.locked():  # a search killed between a trial's end and this may lack it
            self._keep_best()
        return self.ranking()

    def ranking(self) -> list[FrozenTrial]:
        """Return the complete trials, the best first."""
        return sorted(self.study.trials(TrialState.COMPLETE), key=lambda trial: -trial.values[0])

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
                claim = self.study.claim(self.request.trials)
                if claim is not None:
                    with closing(claim.log):  # and with it the claim
                        self._end(claim, self._known_end(claim) or runs.run(claim))
                elif self.study.trials(TrialState.RUNNING):
                    self.stop.wait(WAIT_SECONDS)
                else:
                    return
        except BaseException:
            self.stop.set()  # other workers end, too
            raise
        raise SearchStopped

    def _known_end(self, claim: Claim) -> TrialEnd | None:
        """Return the end of a complete trial with the same values, which would be trained again."""
        for trial in self.study.trials(TrialState.COMPLETE):
            if trial.params == claim.values:
                return TrialEnd(TrialState.COMPLETE, trial.values[0], f"as trial {trial.number}")
        return None

    def _end(self, claim: Claim, end: TrialEnd) -> None:
        """Record a trial's end, and keep the best configuration."""
        with self.study.locked():
            trial = self.study.end(claim, end.state, end.value)
            ended, best = self.study.trials(*ENDED), self._keep_best()
        state = f"{end.value:.4f}" if end.value is not None else trial.state.name.lower()
        logger.info(
            "trial %d: %s%s; %d of %d ended%s",
            trial.number,
            state,
            f" ({end.cause})" if end.cause else "",
            len(ended),
            self.request.trials,
            f", best {best.values[0]:.4f} of trial {best.number}" if best is not None else "",
        )
        if len(ended) >= min(FAILURES, self.request.trials) and all(
            one.state == TrialState.FAIL for one in ended
        ):
            raise ValueError(
                f"{self.out}: the first {len(ended)} trials failed, the last one so: {end.cause}"
            )

    def _keep_best(self) -> FrozenTrial | None:
        """Write the best configuration and drop checkpoints of other trials; call it locked."""
        best = next(iter(self.ranking()), None)
        if best is not None:
            config = load_config(self.out / RECIPE, words_of(self.space, best.params))
            with whole_file(self.out / BEST) as partial:
                save_config(config, partial)
        for trial in self.study.trials(*ENDED) if self.request.keeps == "best" else ():
            if best is None or trial.number != best.number:
                for run in self.study.trial_folder(trial.number).glob("run-*"):
                    shutil.rmtree(run / "checkpoints", ignore_errors=True)
        return best

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


def dataset_digest(data: Location) -> str:
    """Return a hash of a dataset: schema, footers of Parquet files, and content of .npy files.

    Changes that leave a footer as it is are not detected (see `footer_digest`).
    """
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
