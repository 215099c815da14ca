"""RecBole's models read the rows of a run, and are measured as the run's baselines are."""

import json
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from benchmarks.peers.trainings import PeerTraining
from benchmarks.quality.next_item import next_item
from benchmarks.quality.sequence_models import MODELS
from tests.recsys.serving.retrieval.retrieval_runs import train_towers


def counts_of_items(training: PeerTraining) -> dict[str, np.ndarray]:
    """Return the popularity of each item for each row, in place of a trained model's scores."""
    fixed = training.peer.fixed
    with np.load(training.rows / "train.npz") as train, np.load(training.rows / "test.npz") as test:
        counts = np.bincount(train["item"], minlength=fixed["num_items"])
        assert (np.diff(train["offsets"]) > 0).any() and train["label"].all()
        scores = np.tile(np.log1p(counts).astype(np.float32), (len(test["item"]), 1))
        return {"test": scores, "seconds": np.float64(12), "peak": np.float64(3e9)}


def test_a_model_that_scores_by_popularity_has_the_figures_of_popularity(
    session_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    with FileLock(session_folder / "towers.lock"):
        run = train_towers(session_folder / "towers") / "run"
    monkeypatch.setattr(PeerTraining, "result", counts_of_items)
    next_item([run], tmp_path / "recbole", results=tmp_path)

    record = json.loads((tmp_path / "next_item.jsonl").read_text())
    page = (tmp_path / "next_item.md").read_text()
    assert 0 < record["popularity"]["all"]["ndcg@10"] < 1
    rows = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if "|" in line}
    for name in MODELS:
        for subset in ("all", "unseen"):
            assert record[f"RecBole {name}"][subset] == pytest.approx(record["popularity"][subset])
        assert f"blend with model over RecBole {name}" in page
        assert rows[f"RecBole {name}"].endswith("| 12 | 3.00 |")  # seconds and GB of its training
    assert rows["popularity"].endswith("| - | - |")
