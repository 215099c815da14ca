"""Run each training of a peer once, in a process of one thread in the peer's environment."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock

from benchmarks.peers.catalogue import Peer
from benchmarks.peers.rows import METADATA
from recsys.data.item_frequency import ItemCounts
from recsys.evaluation.bootstrap import pooled_metric
from recsys.evaluation.scores import SplitScores

ADAPTERS = Path(__file__).parent / "adapters"
GIGABYTE = 1e9


def digest_of(peer: Peer, windows: list[Path], *extra: Any) -> str:
    """Return a digest of a peer, of the content of the rows, and of anything extra."""
    rows = [(folder / METADATA).read_text() for folder in windows]
    content = [peer.name, peer.requirements, dict(peer.fixed), rows, *extra]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class PeerTraining:
    """A training of a peer on `rows`, a folder of `write_rows`; `out` has the environments."""

    peer: Peer
    rows: Path
    settings: Mapping[str, Any]
    seed: int
    out: Path

    @property
    def file(self) -> Path:
        digest = digest_of(self.peer, [self.rows], dict(self.settings), self.seed)
        return self.out / "trainings" / f"{digest}.npz"

    def scores(self, split: str) -> SplitScores:
        """Train unless that was done, and return the scores of a split.

        Raises:
            RuntimeError: the training failed; names its log.
        """
        values = self.result()[split]
        with np.load(self.rows / f"{split}.npz") as rows, np.load(self.rows / "train.npz") as train:
            # As in a run, drawn rows count for no item.
            logged = train["sampled"] == 0 if "sampled" in train.files else slice(None)
            counts = ItemCounts.of_rows(train["item"][logged]).of(rows["item"])
            users = rows["group" if "group" in rows.files else "user"]
            items, labels = rows["item"], rows["label"]
        if values.shape != labels.shape or not np.isfinite(values).all():
            raise RuntimeError(f"{self.peer.name}: {self.file}: not a finite score of each row")
        logits = values.astype(np.float32)[:, None]
        names = ("label",)
        positions = np.arange(len(labels))
        return SplitScores(positions, users, items, counts, labels[:, None], logits, names)

    def cost(self) -> tuple[float, float]:
        """Return the seconds of the finished training, and its peak memory in GB."""
        result = self.result()
        return float(result["seconds"]), float(result["peak"]) / GIGABYTE

    def result(self) -> dict[str, np.ndarray]:
        """Train unless that was done, and return what the adapter wrote: scores and cost."""
        if not self.file.exists():
            self._train()
        with np.load(self.file) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def _train(self) -> None:
        """Train; the file of scores appears whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        python = python_with(self.peer.requirements, self.out / "environments")
        partial = self.file.with_suffix(".partial.npz")
        job, log = self.file.with_suffix(".json"), self.file.with_suffix(".log")
        settings = {**self.peer.fixed, **self.settings}
        entry = {"rows": str(self.rows.resolve()), "out": str(partial.resolve()), "seed": self.seed}
        job.write_text(json.dumps({**entry, "settings": settings}))
        print(f"training {self.peer.name}, {self.rows.name}, seed {self.seed}", flush=True)
        with log.open("w") as output:
            process = subprocess.run(
                [str(python), str(ADAPTERS / f"{self.peer.adapter}.py"), str(job.resolve())],
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
                cwd=self.file.parent,
            )
        if process.returncode:
            raise RuntimeError(f"training {self.peer.name} failed; see {log}")
        partial.rename(self.file)


INSTALLED = "installed.txt"  # written last


def python_with(requirements: tuple[str, ...], folder: Path) -> Path:
    """Return the interpreter of an environment with these packages; make it if it is missing.

    Raises:
        RuntimeError: a package cannot be installed; names the log.
    """
    names = "\n".join([sys.version, *requirements])
    environment = folder / hashlib.sha256(names.encode()).hexdigest()[:12]
    python, installed = environment / "venv" / "bin" / "python", environment / INSTALLED
    environment.mkdir(parents=True, exist_ok=True)
    with FileLock(environment / "lock"):
        if installed.exists():
            return python
        log = environment / "log.txt"
        with log.open("w") as output:
            for command in (
                [sys.executable, "-m", "venv", "--clear", str(environment / "venv")],
                [str(python), "-m", "pip", "install", *requirements],
            ):
                if subprocess.run(command, stdout=output, stderr=output).returncode:
                    raise RuntimeError(f"{' '.join(requirements)} cannot be installed; see {log}")
        installed.write_text(names)
    return python


METRICS = ("auc", "gauc")


def tuned(peer: Peer, windows: list[Path], trials: int, out: Path) -> dict[str, Any]:
    """Return the settings with the highest mean of AUC and GAUC of validation, pooled.

    A study that was stopped goes on. `windows` are folders of rows; a trial trains on all of them.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {name: repr(values) for name, values in peer.space.items()}
    name = f"{re.sub(r'[^a-z0-9]+', '_', peer.name.lower())}-{digest_of(peer, windows, space)}"
    file = out / "studies" / f"{name}.sqlite"
    file.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{file}",
        study_name=name,
        direction="maximize",
        load_if_exists=True,
    )
    while len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE])) < trials:
        # A sampler that begins anew with the same seed would repeat the first trials.
        study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
        trial = study.ask(dict(peer.space))
        trainings = [PeerTraining(peer, rows, trial.params, 0, out) for rows in windows]
        study.tell(trial, _value(trainings))
    print(f"{peer.name}: {study.best_value:.4f} by {json.dumps(study.best_params)}", flush=True)
    return study.best_params


def _value(trainings: list[PeerTraining]) -> float:
    scores = [training.scores("valid") for training in trainings]
    values = [pooled_metric(scores, metric, "all") or 0.0 for metric in METRICS]
    return sum(values) / len(values)
