"""Finished runs of a small study, as training would leave them, with scores that are known.

Two windows, two seeds, two cells: `ID only` scores at random, and `content` adds to that what
tells a liked item from another.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality.grid import GRIDS, Cell
from benchmarks.quality.runs import Plan, plan_runs, windows
from recsys.evaluation.scores import SplitScores, scores_file, write_scores
from tests.datasets import write_dataset
from tests.recsys.command_runs import TINY

NUM_USERS, NUM_ROWS = 40, 600
CELLS = [
    Cell("ID only", "without content", {"content": "none"}),
    Cell("content", "the recipe", {}, "ID only"),
]
GAIN = {"ID only": 0.0, "content": 1.0}
VALIDATION = {  # AUC of each seed
    "ID only": [0.6, 0.5],
    "content": [0.7, 0.8],
}


def write_windows(folder: Path) -> Path:
    """Two datasets with the test rows that are scored."""
    for name in ("window-1", "window-2"):
        write_dataset(folder / name, {"train": 9, "valid": 9, "test": NUM_ROWS})
    return folder


def scores(window: int, seed: int, gain: float) -> SplitScores:
    """The rows of a window are the same for all runs; the logits are a run's own."""
    rows = np.random.default_rng(window)
    labels = rows.integers(0, 2, (NUM_ROWS, 1)).astype(np.float32)
    noise = np.random.default_rng((7, window, seed)).normal(size=(NUM_ROWS, 1))
    return SplitScores(
        positions=np.arange(NUM_ROWS),
        groups=rows.integers(0, NUM_USERS, NUM_ROWS),
        items=rows.integers(0, 100, NUM_ROWS),
        counts=rows.integers(0, 12, NUM_ROWS),
        labels=labels,
        logits=(noise + gain * labels).astype(np.float32),
        label_names=("liked",),
    )


def write_run(folder: Path, split_scores: SplitScores, validation_auc: float) -> None:
    """What a finished run leaves, as far as the study reads it."""
    folder.mkdir(parents=True)
    subset_metrics = {"auc": validation_auc, "gauc": validation_auc - 0.1, "num_samples": NUM_ROWS}
    valid = {**subset_metrics, "cold": subset_metrics, "unseen": {**subset_metrics, "gauc": None}}
    metrics = {"valid": valid, "test": {"auc": 0.123}, "train": {"seconds": 2.0}}
    write_scores(split_scores, scores_file(folder, "test"))
    (folder / "metrics.json").write_text(json.dumps(metrics))


def write_runs(data: Path, out: Path) -> Plan:
    """All runs of the study."""
    by_name = {cell.name: cell.settings for cell in CELLS}
    plan = plan_runs(by_name, windows(str(data)), out, TINY, seeds=range(2))
    for name, by_seed in plan.items():
        for seed, runs in enumerate(by_seed):
            for window, run in enumerate(runs):
                run_scores = scores(window, seed, GAIN[name])
                write_run(run.folder, run_scores, VALIDATION[name][seed])
    return plan


def use_small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--grid small` is `CELLS`."""
    monkeypatch.setitem(GRIDS, "small", CELLS)
