"""Trainings of peers: each once, in a process of one thread in the peer's environment."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.catalogue import Peer
from benchmarks.peers.environments import python_with
from benchmarks.peers.rows import ABOUT
from recsys.data.item_frequency import ItemCounts
from recsys.evaluation.scores import SplitScores

ADAPTERS = Path(__file__).parent / "adapters"
GIGABYTE = 1e9


def digest_of(peer: Peer, windows: list[Path], *further: Any) -> str:
    """Return a digest of a peer, of the content of the rows, and of anything further."""
    rows = [(place / ABOUT).read_text() for place in windows]
    about = [peer.name, peer.requirements, dict(peer.fixed), rows, *further]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class PeerTraining:
    """A training of a peer on the rows of a window.

    rows: folder that `write_rows` wrote.
    out: folder of environments and trainings.
    """

    peer: Peer
    rows: Path
    settings: Mapping[str, Any]
    seed: int
    out: Path

    @property
    def file(self) -> Path:
        """The file with the scores."""
        digest = digest_of(self.peer, [self.rows], dict(self.settings), self.seed)
        return self.out / "trainings" / f"{digest}.npz"

    def scores(self, split: str) -> SplitScores:
        """Train unless that was done, and return the scores of a split.

        Raises:
            RuntimeError: the training failed; names its log.
        """
        values = self._result()[split]
        with np.load(self.rows / f"{split}.npz") as rows, np.load(self.rows / "train.npz") as train:
            counts = ItemCounts.of_rows(train["item"]).of(rows["item"])
            users, items, labels = rows["user"], rows["item"], rows["label"]
        if values.shape != labels.shape or not np.isfinite(values).all():
            raise RuntimeError(f"{self.peer.name}: {self.file}: not a finite score of each row")
        logits = values.astype(np.float32)[:, None]
        names = ("label",)
        places = np.arange(len(labels))
        return SplitScores(places, users, items, counts, labels[:, None], logits, names)

    def cost(self) -> tuple[float, float]:
        """Return the seconds of the finished training, and its peak memory in GB."""
        result = self._result()
        return float(result["seconds"]), float(result["peak"]) / GIGABYTE

    def _result(self) -> dict[str, np.ndarray]:
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
        words = {"rows": str(self.rows.resolve()), "out": str(partial.resolve()), "seed": self.seed}
        job.write_text(json.dumps({**words, "settings": settings}))
        print(f"training {self.peer.name}, {self.rows.name}, seed {self.seed}", flush=True)
        with log.open("w") as output:
            done = subprocess.run(
                [str(python), str(ADAPTERS / f"{self.peer.adapter}.py"), str(job.resolve())],
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
                cwd=self.file.parent,
            )
        if done.returncode:
            raise RuntimeError(f"training {self.peer.name} failed; see {log}")
        partial.rename(self.file)
