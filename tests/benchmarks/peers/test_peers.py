"""Peers get the rows of a dataset, and their scores are compared only if they are of all rows."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks.peers import trainings
from benchmarks.peers.catalogue import PEERS
from benchmarks.peers.trainings import PeerTraining


@pytest.fixture
def peer_rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(trainings.ADAPTERS))
    import peer_rows

    return peer_rows


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A window with two users, whose second has no history."""
    folder = tmp_path / "window"
    folder.mkdir()
    columns = {
        "user": np.array([1, 1, 2, 2]),
        "item": np.array([4, 5, 4, 6]),
        "label": np.array([1, 0, 1, 0], np.float32),
        "offsets": np.array([0, 3, 4, 4, 4]),
        "history": np.array([7, 8, 9, 7]),
    }
    (folder / "about.json").write_text("{}")
    for split in ("train", "valid", "test"):
        np.savez(folder / f"{split}.npz", **columns)
    return folder


def with_scores(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    result = {"valid": np.array(values), "test": np.array(values)}
    monkeypatch.setattr(PeerTraining, "_result", lambda self: result)


def test_histories_are_padded_before_their_last_items(peer_rows: ModuleType, rows: Path) -> None:
    read = peer_rows.Rows.read(rows, "train")
    assert read.padded(read.history, 2).tolist() == [[8, 9], [0, 7], [0, 0], [0, 0]]


def test_scores_are_those_of_the_rows_with_training_rows_of_their_items(
    monkeypatch: pytest.MonkeyPatch, rows: Path
) -> None:
    with_scores(monkeypatch, [0.9, 0.1, 0.2, 0.3])
    scores = PeerTraining(PEERS[0], rows, {}, 0, rows).scores("test")
    assert scores.counts.tolist() == [2, 1, 2, 1]
    assert scores.groups.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("values", [[0.1, 0.2], [0.1, 0.2, float("nan"), 0.4]])
def test_scores_of_other_rows_are_an_error(
    monkeypatch: pytest.MonkeyPatch, rows: Path, values: list[float]
) -> None:
    with_scores(monkeypatch, values)
    with pytest.raises(RuntimeError, match="finite score"):
        PeerTraining(PEERS[0], rows, {}, 0, rows).scores("test")
