"""The search in long histories against a loop that sorts each row by cosine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from embeddings import MemoryBank
from recsys.content.history_search import shorten_histories
from recsys.data.jagged_history import JaggedHistory
from tests.recsys.content.item_batches import batch_of_items

NUM_ITEMS, DIM = 12, 4
TARGETS = [3, 5, 3, 7]
HISTORIES = [[1, 2, 9, 3, 1, 0], [], [4, 8], [11, 10, 9, 8, 7, 6, 5]]


def bank() -> MemoryBank:
    bank = MemoryBank(NUM_ITEMS, DIM, "cpu")
    vectors = torch.randn(NUM_ITEMS, DIM, generator=torch.Generator().manual_seed(0))
    bank.update(torch.arange(NUM_ITEMS), vectors, step=0)
    return bank


def kept_by_loop(top_k: int) -> list[list[int]]:
    """By row: the places that stay, counted over all histories."""
    vectors, _ = bank().lookup(torch.arange(NUM_ITEMS))
    rows, first = [], 0
    for target, history in zip(TARGETS, HISTORIES, strict=True):
        cosine = [
            float(torch.cosine_similarity(vectors[target], vectors[item], dim=0))
            for item in history
        ]
        best = sorted(range(len(history)), key=lambda place: (cosine[place], place))[-top_k:]
        rows.append([first + place for place in sorted(best)])
        first += len(history)
    return rows


@pytest.mark.parametrize("index_dedup", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, 6, 50])
def test_each_history_keeps_its_items_most_like_the_target_in_their_order(
    top_k: int, index_dedup: bool
) -> None:
    batch = batch_of_items(TARGETS, HISTORIES, index_dedup)
    short = shorten_histories(batch, bank(), top_k, index_dedup)
    rows = kept_by_loop(top_k)
    places = [place for row in rows for place in row]
    everything = [item for history in HISTORIES for item in history]
    assert short.history_values[:, 0].tolist() == places
    assert short.history_lengths.tolist() == [len(row) for row in rows]
    assert short.longest_history == max(len(row) for row in rows)
    items = short.history_items[short.history_index].tolist()
    assert items == [everything[place] for place in places]
    assert short.history_items.tolist() == sorted(set(items))
    target, history = (short.sequence_features[name] for name in ("item", "history"))
    assert target.values().tolist() == TARGETS
    assert history.values().tolist() == (sorted(set(items)) if index_dedup else items)
    if not index_dedup:
        assert history.lengths().tolist() == short.history_lengths.tolist()


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
    shorten_histories(batch_of_items(TARGETS, HISTORIES), on_gpu, 2, True)
    assert happened == [("wait", streams["steps"]), ("read", None)]


def test_of_equal_items_the_later_ones_stay() -> None:
    history = JaggedHistory.of(torch.zeros(5, dtype=torch.long), torch.tensor([1, 4]), 1)
    kept = history.highest(torch.tensor([0.5, 0.1, 0.5, 0.5, 0.5]), 2)
    assert kept.tolist() == [0, 3, 4]


def test_the_batch_without_history_stays_as_it_is() -> None:
    batch = batch_of_items(TARGETS)
    short = shorten_histories(batch, bank(), 2, True)
    same: list[tuple[Tensor, Tensor]] = [
        (short.history_index, batch.history_index),
        (short.history_lengths, batch.history_lengths),
        (short.sequence_features.values(), batch.sequence_features.values()),
    ]
    assert all(torch.equal(left, right) for left, right in same)
