"""RecBole's models read the rows of a run, and are measured as the run's baselines are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from benchmarks.peers.trainings import PeerTraining
from benchmarks.quality.sequence_models import MODELS, sequence_models
from recsys.distributed.ranks import joined_ranks
from recsys.serving.retrieval.baselines import compare_with_baselines
from tests.recsys.serving.retrieval.retrieval_runs import train_towers


def counts_of_items(training: PeerTraining) -> dict[str, np.ndarray]:
    """Return the popularity of each item for each row, in place of a trained model's scores."""
    fixed = training.peer.fixed
    with np.load(training.rows / "train.npz") as train, np.load(training.rows / "test.npz") as test:
        counts = np.bincount(train["item"], minlength=fixed["num_items"])
        assert (np.diff(train["offsets"]) > 0).any() and train["label"].all()
        return {"test": np.tile(np.log1p(counts).astype(np.float32), (len(test["item"]), 1))}


def test_a_model_that_scores_by_popularity_has_the_figures_of_popularity(
    session_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    with FileLock(session_folder / "towers.lock"):
        run = train_towers(session_folder / "towers") / "run"
    monkeypatch.setattr(PeerTraining, "result", counts_of_items)
    with joined_ranks("cpu") as ranks:
        reports, gains = compare_with_baselines(run, None, ranks)
        models = sequence_models(run, tmp_path, ranks)

    assert list(models) == [f"RecBole {name}" for name in MODELS]
    for report, model_gains in models.values():
        assert model_gains.tolist() == pytest.approx(gains["popularity"].tolist())
        assert report["all"]["recall@10"] == pytest.approx(
            reports["popularity"]["all"]["recall@10"]
        )
    assert 0 < gains["popularity"].mean() < 1
