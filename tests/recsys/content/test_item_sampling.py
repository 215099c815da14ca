"""Sampled items: which are encoded, and the branch against encoding or reading each by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from recsys.config import SamplingSettings
from recsys.content.branch import ContentBranch
from recsys.content.item_sampling import sample_items
from recsys.data.batch import Batch
from tests.recsys.content.item_batches import batch_of_items
from tests.recsys.content.tiny_branch import (
    DIM,
    HISTORY,
    NUM_ITEMS,
    TARGETS,
    batch_of,
    branch_of,
    content_of,
)

TARGETS_OF_TEN = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 3]


def sampled(forward: float, backward: float, step: int = 0, rank: int = 0) -> Batch:
    return sample_items(
        batch_of_items(TARGETS_OF_TEN), SamplingSettings(forward, backward), (7, step, rank)
    )


@pytest.mark.parametrize(
    ("forward", "backward", "encoded", "trained"),
    [(1.0, 0.5, 10, 5), (0.5, 0.2, 5, 2), (0.2, 0.2, 2, 2), (0.01, 0.01, 1, 1)],
)
def test_shares_of_the_unique_items_are_encoded_and_the_rest_is_read_from_the_bank(
    forward: float, backward: float, encoded: int, trained: int
) -> None:
    batch = sampled(forward, backward)
    assert (len(batch.content_items), batch.with_gradient) == (encoded, trained)
    items = torch.cat([batch.content_items, batch.bank_items])
    assert items.sort().values.tolist() == list(range(10))
    assert items[batch.target_index].tolist() == TARGETS_OF_TEN


def test_the_choice_depends_on_seed_step_and_rank_alone() -> None:
    chosen = [sampled(0.5, 0.5, *place).content_items.tolist() for place in ((0, 0), (0, 0))]
    assert chosen[0] == chosen[1]
    others = {
        tuple(sampled(0.5, 0.5, step, rank).content_items.tolist())
        for step in range(3)
        for rank in range(3)
    }
    assert len(others) == 9


def test_every_item_is_chosen_equally_often() -> None:
    counts = torch.zeros(10)
    for step in range(300):
        counts[sampled(0.5, 0.2, step).content_items] += 1
    assert counts.min() > 120 and counts.max() < 180


def one_by_one(branch: ContentBranch, batch: Batch, stale: Tensor) -> Tensor:
    """[B, D]: each target encoded with or without gradient, or read, by itself."""
    encoded = batch.content_items.tolist()
    rows = []
    for item in TARGETS.tolist():
        if item not in encoded:
            rows.append(stale[item, :DIM])
            continue
        vector = branch.encode(content_of(torch.tensor([item])))[0, :DIM]
        with_gradient = encoded.index(item) < (batch.with_gradient or 0)
        rows.append(vector if with_gradient else vector.detach())
    return torch.stack(rows)


@pytest.mark.parametrize("backward", [0.3, 0.6])
def test_vectors_and_gradients_equal_those_of_items_taken_one_by_one(backward: float) -> None:
    branch, naive = branch_of("bank_lora"), branch_of("bank_lora")
    batch = sample_items(batch_of("bank_lora"), SamplingSettings(0.6, backward), (0, 0, 0))
    batch = replace(batch, content=content_of(batch.content_items))
    assert len(batch.content_items) == 2 and len(batch.bank_items) == 1
    assert branch.bank is not None
    stale, _ = branch.bank.lookup(torch.arange(NUM_ITEMS))
    vectors, expected = branch(batch).target, one_by_one(naive, batch, stale)
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)
    factor = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for result in (vectors, expected):
        (factor * result.square()).sum().backward()
    wanted = {name: part.grad for name, part in naive.named_parameters()}
    assert sum(gradient is not None for gradient in wanted.values()) > 10
    for name, parameter in branch.named_parameters():
        assert (parameter.grad is None) == (wanted[name] is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5, rtol=1e-4, msg=name)
    written, _ = branch.bank.lookup(torch.arange(NUM_ITEMS))
    changed = (written != stale).any(dim=1).nonzero().squeeze(1)
    assert changed.tolist() == batch.content_items.sort().values.tolist()


def test_without_same_step_histories_see_what_the_bank_held_before() -> None:
    branch = branch_of("bank_frozen")
    branch.same_step = False
    assert branch.bank is not None
    stale, _ = branch.bank.lookup(torch.arange(NUM_ITEMS))
    vectors = branch(batch_of("bank_frozen"))
    assert torch.equal(vectors.read_history()[0], stale[HISTORY.unique(), :DIM])
    written, _ = branch.bank.lookup(torch.arange(NUM_ITEMS))
    assert not torch.equal(written, stale)
