"""Peers get the same rows and are scored alike; the published EM3 is as its paper says."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.peers import trainings
from benchmarks.peers.catalogue import PEERS
from benchmarks.peers.rows import _arrays
from benchmarks.peers.trainings import PeerTraining
from recsys.data.parquet.columns import RowColumns
from recsys.data.parquet.values import RAW_GROUP
from recsys.data.schema import Column, Schema


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


def test_a_log_without_values_has_ones_beside_the_history_and_counts_as_numbers() -> None:
    table = pa.table(
        {
            "user": [5, 5],
            RAW_GROUP: [70, 71],  # users without a row of their own
            "item": [1, 2],
            "history": [[3, 4], [1]],
            "views": [0.5, 1.5],
            "taken": [1.0, 0.0],
        }
    )
    columns = {
        "user": Column("id", num_embeddings=6),
        "item": Column("id", num_embeddings=6),
        "history": Column("sequence", shares="item"),
        "views": Column("dense"),
        "taken": Column("label"),
    }

    arrays = _arrays(RowColumns.of(table), Schema("item", "user", columns))

    assert arrays["group"].tolist() == [70, 71] and arrays["numbers"].tolist() == [[0.5], [1.5]]
    assert arrays["offsets"].tolist() == [0, 2, 3] and arrays["history"].tolist() == [3, 4, 1]
    assert all(arrays[name].tolist() == [1, 1, 1] for name in ("history_liked", "history_stars"))


def test_drawn_rows_of_training_count_for_no_item(
    monkeypatch: pytest.MonkeyPatch, rows: Path
) -> None:
    with np.load(rows / "train.npz") as arrays:
        np.savez(rows / "train.npz", **arrays, sampled=np.array([0, 0, 1, 0]))
    with_scores(monkeypatch, [0.9, 0.1, 0.2, 0.3])
    scores = PeerTraining(PEERS[0], rows, {}, 0, rows).scores("test")
    assert scores.counts.tolist() == [1, 1, 1, 1]  # of items 4, 5, 4, 6


def test_scores_are_averaged_by_the_group_of_the_rows(
    monkeypatch: pytest.MonkeyPatch, rows: Path
) -> None:
    with np.load(rows / "test.npz") as arrays:
        np.savez(rows / "test.npz", **arrays, group=np.array([8, 8, 9, 9]))
    with_scores(monkeypatch, [0.9, 0.1, 0.2, 0.3])
    scores = PeerTraining(PEERS[0], rows, {}, 0, rows).scores("test")
    assert scores.groups.tolist() == [8, 8, 9, 9]


def with_scores(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    result = {"valid": np.array(values), "test": np.array(values)}
    monkeypatch.setattr(PeerTraining, "result", lambda self: result)


def test_histories_are_padded_before_their_last_items(peer_rows: ModuleType, rows: Path) -> None:
    read = peer_rows.Rows.read(rows, "train")
    assert read.padded(read.history, 2).tolist() == [[8, 9], [0, 7], [0, 0], [0, 0]]


def test_histories_are_padded_behind_for_recbole(peer_rows: ModuleType, rows: Path) -> None:
    columns = peer_rows.padded_behind(peer_rows.Rows.read(rows, "train"), 2)
    assert columns["item_id_list"].tolist() == [[9, 10], [8, 0], [0, 0], [0, 0]]  # 0 pads
    assert columns["item_length"].tolist() == [2, 1, 1, 1]  # at least 1, as RecBole reads the last
    assert columns["item_id"].tolist() == [5, 6, 5, 7]


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


SETTINGS = {
    "dim": 8,
    "queries": 2,
    "layers": 1,
    "dropout": 0.0,
    "learning_rate": 0.02,
    "contrastive_weight": 0.01,
    "batch_size": 16,
}
NUM_ITEMS = 12


@pytest.fixture
def em3_rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(trainings.ADAPTERS))
    import em3_rows

    return em3_rows


def vectors() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.normal(size=(NUM_ITEMS, width)).astype(np.float32) for width in (3, 5)]


def test_padding_changes_no_logit_and_equal_items_are_fused_alike(em3_rows: ModuleType) -> None:
    torch.manual_seed(0)
    model = em3_rows.EM3(vectors(), 2, 1, SETTINGS).eval()
    users, stars = torch.tensor([0, 1]), torch.tensor([[3, 4, 11], [5, 5, 11]])
    items = torch.tensor([[2, 2, 7], [7, 3, 2]])
    numbers = torch.tensor([[0.5], [2.0]])
    logits, _ = model(users, items, stars, numbers)
    padded_items, padded_stars = (torch.nn.functional.pad(ids, (2, 0)) for ids in (items, stars))
    padded, _ = model(users, padded_items, padded_stars, numbers)
    alone, _ = model(users[1:], items[1:], stars[1:], numbers[1:])
    torch.testing.assert_close(padded, logits)
    torch.testing.assert_close(alone, logits[1:])
    torch.testing.assert_close(model.fused(items.flatten())[0], model.fused(torch.tensor([2]))[0])


def test_weights_of_history_items_are_the_published_layers_over_four_vectors(
    em3_rows: ModuleType,
) -> None:
    torch.manual_seed(0)
    model = em3_rows.EM3(vectors(), 2, 1, SETTINGS)
    width = 2 * int(SETTINGS["dim"])
    history = torch.randn(3, 5, width, requires_grad=True)
    target = torch.randn(3, width, requires_grad=True)
    inputs = (history, target, *model.score.parameters())

    targets = target[:, None].expand_as(history)
    pairs = torch.cat([history, targets, history - targets, history * targets], dim=2)
    published = model.score(pairs).squeeze(2)
    weights = model._weights(history, target)

    torch.testing.assert_close(weights, published)
    torch.testing.assert_close(
        torch.autograd.grad(weights.square().sum(), inputs),
        torch.autograd.grad(published.square().sum(), inputs),
    )


def test_items_of_a_row_are_no_negatives_of_themselves(em3_rows: ModuleType) -> None:
    sides = torch.eye(3)[[0, 0, 1]]
    loss = em3_rows.contrastive(sides, sides, torch.tensor([5, 5, 6]))
    rows = torch.tensor([10.0, 10.0, 10.0])  # the cosine 1 over the temperature
    negatives = torch.tensor([1.0, 1.0, 2.0])  # negatives, whose cosine is 0
    torch.testing.assert_close(loss, (torch.log(rows.exp() + negatives) - rows).mean())


def test_a_study_that_goes_on_repeats_no_trial(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def value(trial: list[PeerTraining]) -> float:
        tried.append(json.dumps(trial[0].settings))
        return 0.5

    monkeypatch.setattr(trainings, "_value", value)
    for num_trials in (2, 4):
        trainings.tuned(PEERS[2], [rows], num_trials, tmp_path)
    assert len(tried) == len(set(tried)) == 4
