"""Peers that train a text encoder: their batches, loss and scores on a few rows."""

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.peers import trainings

NUM_ITEMS, DIM = 6, 4


class Items(nn.Module):
    """Vectors in place of an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(1, DIM)
        self.table = torch.randn(NUM_ITEMS, DIM)

    def forward(self, items: Tensor) -> Tensor:  # [U] -> [U, D]
        return self.table[items]

    def all_vectors(self) -> Tensor:
        return self.table


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(trainings.ADAPTERS))
    import legommenders_rows
    import morec_rows
    import peer_rows

    return legommenders_rows, morec_rows, peer_rows


def rows_of(peer_rows: ModuleType, users: list[int], labels: list[float]) -> object:
    """Rows of items 0, 1, 2 ..., each with the items before it as its history."""
    lengths = np.arange(len(users))
    history = np.concatenate([np.arange(length) for length in lengths]).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = np.arange(len(users))
    numbers = np.ones((len(users), 2), np.float32)
    label = np.array(labels, np.float32)
    return peer_rows.Rows(np.array(users), items, label, offsets, history, {}, numbers)


def test_a_batch_has_blocks_of_one_user_s_rows(
    adapters: tuple[ModuleType, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    legommenders, _, _ = adapters
    monkeypatch.setattr(legommenders, "ROWS_OF_USER", 2)
    user = np.array([1, 2, 1, 2, 1, 1])
    batches = list(legommenders.batches_by_user(user, 4, np.random.default_rng(0)))
    assert [len(batch) for batch in batches] == [4, 2]
    order = torch.cat(batches).tolist()
    blocks = {tuple(order[first : first + 2]) for first in (0, 2, 4)}
    assert blocks == {(0, 2), (4, 5), (1, 3)}


def test_a_click_model_scores_a_row_alike_in_training_and_from_vectors_of_all_items(
    adapters: tuple[ModuleType, ...],
) -> None:
    legommenders, _, peer_rows = adapters
    columns = legommenders.Columns(rows_of(peer_rows, [1, 1, 2, 2], [1, 0, 1, 0]))
    model = legommenders.Legommender(Items(), 2, {"dropout": 0.0, "cross_layers": 2}).eval()
    scores = legommenders.scores(model, columns, 3)
    for rows in ([0, 1, 2, 3], [3, 2]):  # with and without a row that has no history
        logits = legommenders.logits_of(model, columns, torch.tensor(rows))
        np.testing.assert_allclose(logits.detach().numpy(), scores[rows], rtol=1e-5, atol=1e-6)


def test_sequences_are_the_items_that_users_took(adapters: tuple[ModuleType, ...]) -> None:
    _, morec, peer_rows = adapters
    rows = rows_of(peer_rows, [1, 2, 1, 2, 1, 3], [1, 1, 1, 0, 1, 1])
    assert morec.sequences(rows)[:, :4].tolist() == [[1, 3, 5, 0]]  # ids from 1; one item is none


def test_the_next_item_is_found_among_items_that_the_user_has_not(
    adapters: tuple[ModuleType, ...],
) -> None:
    _, morec, _ = adapters
    torch.manual_seed(0)
    model = morec.TextSASRec(Items(), {"dropout": 0.0, "layers": 1}).eval()
    batch = torch.tensor([[1, 2, 3], [4, 5, 0]])
    log_shares = torch.randn(NUM_ITEMS + 1)
    losses = []
    for sequence in ([1, 2, 3], [4, 5]):
        states = model(model.items.table[torch.tensor(sequence[:-1]) - 1][None])[0]
        for state, target in zip(states, sequence[1:]):
            rivals = [target] + [item for item in range(1, 6) if item not in sequence]
            logits = model.items.table[torch.tensor(rivals) - 1] @ state
            losses.append(-(logits - log_shares[rivals]).log_softmax(0)[0])
    loss = morec.next_item_loss(model, batch, log_shares)
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_a_row_s_score_is_that_of_its_target_after_its_history(
    adapters: tuple[ModuleType, ...],
) -> None:
    _, morec, peer_rows = adapters
    model = morec.TextSASRec(Items(), {"dropout": 0.0, "layers": 1}).eval()
    scores = morec.scores(model, rows_of(peer_rows, [1] * 4, [1.0] * 4))
    table = model.items.table
    expected = [0.0] + [float(model(table[None, :n])[0, -1] @ table[n]) for n in (1, 2, 3)]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
