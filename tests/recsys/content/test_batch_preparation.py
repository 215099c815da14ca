"""Batches before the pipeline: sampled items and searched histories."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from embeddings import MemoryBank
from recsys.config import SamplingSettings
from recsys.content.batch_preparation import sample_items, shorten_histories
from recsys.content.branch import ContentBranch
from recsys.data.batch import BatchContent
from tests.recsys.content.item_batches import batch_of_items
from tests.recsys.content.tiny_branch import (
    DIM,
    NUM_ITEMS,
    TARGETS,
    batch_of,
    branch_of,
    content_of,
)

TARGETS_OF_TEN = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 3]


def sampled(forward: float, backward: float, step: int = 0, rank: int = 0) -> BatchContent:
    content = batch_of_items(TARGETS_OF_TEN).content
    return sample_items(content, SamplingSettings(forward, backward), (7, step, rank))


@pytest.mark.parametrize(
    ("forward", "backward", "encoded", "trained"),
    [(1.0, 0.5, 10, 5), (0.5, 0.2, 5, 2), (0.2, 0.2, 2, 2), (0.01, 0.01, 1, 1)],
)
def test_shares_of_the_unique_items_are_encoded_and_the_rest_is_read_from_the_bank(
    forward: float, backward: float, encoded: int, trained: int
) -> None:
    content = sampled(forward, backward)
    assert (len(content.items), content.with_gradient) == (encoded, trained)
    items = torch.cat([content.items, content.bank_items])
    assert items.sort().values.tolist() == list(range(10))
    assert items[content.target_index].tolist() == TARGETS_OF_TEN


def test_the_choice_depends_on_seed_step_and_rank_alone() -> None:
    selections = [sampled(0.5, 0.5, *place).items.tolist() for place in ((0, 0), (0, 0))]
    assert selections[0] == selections[1]
    distinct_selections = {
        tuple(sampled(0.5, 0.5, step, rank).items.tolist())
        for step in range(3)
        for rank in range(3)
    }
    assert len(distinct_selections) == 9


def test_every_item_is_chosen_equally_often() -> None:
    counts = torch.zeros(10)
    for step in range(300):
        counts[sampled(0.5, 0.2, step).items] += 1
    assert counts.min() > 120 and counts.max() < 180


def one_by_one(branch: ContentBranch, content: BatchContent, stale: Tensor) -> Tensor:
    """[B, D]: each target encoded with or without gradient, or read, by itself."""
    encoded = content.items.tolist()
    rows = []
    for item in TARGETS.tolist():
        if item not in encoded:
            rows.append(stale[item, :DIM])
            continue
        vector = branch.encode(content_of(torch.tensor([item])))[0, :DIM]
        with_gradient = encoded.index(item) < (content.with_gradient or 0)
        rows.append(vector if with_gradient else vector.detach())
    return torch.stack(rows)


@pytest.mark.parametrize("backward", [0.3, 0.6])
def test_vectors_and_gradients_equal_those_of_items_taken_one_by_one(backward: float) -> None:
    branch, naive = branch_of("bank_lora"), branch_of("bank_lora")
    batch = batch_of("bank_lora")
    content = sample_items(batch.content, SamplingSettings(0.6, backward), (0, 0, 0))
    content.inputs = content_of(content.items)
    batch = replace(batch, content=content)
    assert len(content.items) == 2 and len(content.bank_items) == 1
    assert branch.bank is not None
    stale, _ = branch.bank.lookup(torch.arange(NUM_ITEMS))
    vectors, expected = branch(batch).target, one_by_one(naive, content, stale)
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)
    factor = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for result in (vectors, expected):
        (factor * result.square()).sum().backward()
    gradients = {name: part.grad for name, part in naive.named_parameters()}
    assert sum(gradient is not None for gradient in gradients.values()) > 10
    for name, parameter in branch.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(
                parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name
            )
    stored, _ = branch.bank.lookup(torch.arange(NUM_ITEMS))
    changed = (stored != stale).any(dim=1).nonzero().squeeze(1)
    assert changed.tolist() == content.items.sort().values.tolist()


SEARCHED_ITEMS, SEARCH_DIM = 12, 4
SEARCH_TARGETS = [3, 5, 3, 7]
SEARCHED_HISTORIES = [[1, 2, 9, 3, 1, 0], [], [4, 8], [11, 10, 9, 8, 7, 6, 5]]


def bank() -> MemoryBank:
    bank = MemoryBank(SEARCHED_ITEMS, SEARCH_DIM, "cpu")
    vectors = torch.randn(SEARCHED_ITEMS, SEARCH_DIM, generator=torch.Generator().manual_seed(0))
    bank.update(torch.arange(SEARCHED_ITEMS), vectors, step=0)
    return bank


def kept_by_loop(top_k: int) -> list[list[int]]:
    """By row: the places that stay, counted over all histories."""
    vectors, _ = bank().lookup(torch.arange(SEARCHED_ITEMS))
    rows, first = [], 0
    for target, history in zip(SEARCH_TARGETS, SEARCHED_HISTORIES, strict=True):
        cosine = [
            float(torch.cosine_similarity(vectors[target], vectors[item], dim=0))
            for item in history
        ]
        best = sorted(range(len(history)), key=lambda place: (cosine[place], place))[-top_k:]
        rows.append([first + place for place in sorted(best)])
        first += len(history)
    return rows


@pytest.mark.parametrize("top_k", [1, 3, 6, 50])
def test_each_history_keeps_its_items_most_like_the_target_in_their_order(top_k: int) -> None:
    batch = batch_of_items(SEARCH_TARGETS, SEARCHED_HISTORIES)
    short = shorten_histories(batch, bank(), top_k)
    rows = kept_by_loop(top_k)
    places = [place for row in rows for place in row]
    everything = [item for history in SEARCHED_HISTORIES for item in history]
    assert short.history.values[:, 0].tolist() == places
    assert short.history.lengths.tolist() == [len(row) for row in rows]
    assert short.history.longest == max(len(row) for row in rows)
    items = short.history.items[short.history.index].tolist()
    assert items == [everything[place] for place in places]
    assert short.history.items.tolist() == sorted(set(items))
    target, history = (short.sequence_features[name] for name in ("item", "history"))
    assert target.values().tolist() == SEARCH_TARGETS
    assert history.values().tolist() == sorted(set(items))


def test_on_cuda_the_search_waits_for_the_writes_of_earlier_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    happened: list[tuple[str, object]] = []
    streams = {name: SimpleNamespace(name=name) for name in ("copies", "steps")}
    streams["copies"].wait_stream = lambda other: happened.append(("wait", other))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["copies"])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: streams["steps"])
    on_host = bank()

    def lookup(ids: Tensor) -> tuple[Tensor, Tensor]:
        happened.append(("read", None))
        return on_host.lookup(ids)

    on_gpu: Any = SimpleNamespace(device=torch.device("cuda", 0), lookup=lookup)
    shorten_histories(batch_of_items(SEARCH_TARGETS, SEARCHED_HISTORIES), on_gpu, 2)
    assert happened == [("wait", streams["steps"]), ("read", None)]
