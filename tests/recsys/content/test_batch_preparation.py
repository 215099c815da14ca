"""Batches before the pipeline: searched histories."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from embeddings import MemoryBank
from recsys.content.batch_preparation import shorten_histories
from tests.recsys.content.item_batches import batch_of_items

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
        best = sorted(range(len(history)), key=lambda index: (cosine[index], index))[-top_k:]
        rows.append([first + index for index in sorted(best)])
        first += len(history)
    return rows


@pytest.mark.parametrize("top_k", [1, 3, 6, 50])
def test_each_history_keeps_its_items_most_like_the_target_in_their_order(top_k: int) -> None:
    batch = batch_of_items(SEARCH_TARGETS, SEARCHED_HISTORIES)
    short = shorten_histories(batch, bank(), top_k)()
    rows = kept_by_loop(top_k)
    indices = [index for row in rows for index in row]
    everything = [item for history in SEARCHED_HISTORIES for item in history]
    assert short.history.values[:, 0].tolist() == indices
    assert short.history.lengths.tolist() == [len(row) for row in rows]
    assert short.history.longest == max(len(row) for row in rows)
    items = short.history.items[short.history.index].tolist()
    assert items == [everything[index] for index in indices]
    assert short.history.items.tolist() == sorted(set(items))
    target, history = (short.sequence_features[name] for name in ("item", "history"))
    assert target.values().tolist() == SEARCH_TARGETS
    assert history.values().tolist() == sorted(set(items))


def test_on_cuda_the_search_reads_what_earlier_steps_wrote_and_is_waited_for_a_step_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    happened: list[object] = []
    streams = {name: SimpleNamespace(name=name) for name in ("copies", "steps")}
    streams["copies"].wait_stream = lambda other: happened.append(("wait", other))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["copies"])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: streams["steps"])
    arrived = SimpleNamespace(
        record=lambda stream: happened.append(("record", stream)),
        synchronize=lambda: happened.append("arrived"),
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda: arrived)
    on_host = bank()

    def lookup(ids: Tensor, route: object) -> tuple[Tensor, Tensor]:
        happened.append("read")
        return on_host.lookup(ids)

    device = torch.device("cuda", 0)
    on_gpu: Any = SimpleNamespace(device=device, lookup=lookup, routes=on_host.routes)
    batch = batch_of_items(SEARCH_TARGETS, SEARCHED_HISTORIES)
    finish = shorten_histories(batch, on_gpu, 2)
    assert happened == [("wait", streams["steps"]), "read", ("record", streams["copies"])]
    finish()
    assert happened[3:] == ["arrived"]
