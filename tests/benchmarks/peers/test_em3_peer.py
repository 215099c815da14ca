"""The EM3 of public implementations: distinct items fused once, and a training that learns."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from benchmarks.peers import trainings

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
    model = em3_rows.EM3(vectors(), 2, SETTINGS).eval()
    users, stars = torch.tensor([0, 1]), torch.tensor([[3, 4, 11], [5, 5, 11]])
    items = torch.tensor([[2, 2, 7], [7, 3, 2]])
    logits, _ = model(users, items, stars)
    padded, _ = model(
        users, torch.nn.functional.pad(items, (2, 0)), torch.nn.functional.pad(stars, (2, 0))
    )
    alone, _ = model(users[1:], items[1:], stars[1:])
    torch.testing.assert_close(padded, logits)
    torch.testing.assert_close(alone, logits[1:])
    torch.testing.assert_close(model.fused(items.flatten())[0], model.fused(torch.tensor([2]))[0])


def test_items_of_a_row_are_no_negatives_of_themselves(em3_rows: ModuleType) -> None:
    sides = torch.eye(3)[[0, 0, 1]]
    loss = em3_rows.contrastive(sides, sides, torch.tensor([5, 5, 6]))
    rows = torch.tensor([10.0, 10.0, 10.0])  # the cosine 1 over the temperature
    negatives = torch.tensor([1.0, 1.0, 2.0])  # negatives, whose cosine is 0
    torch.testing.assert_close(loss, (torch.log(rows.exp() + negatives) - rows).mean())
