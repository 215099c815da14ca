"""Softmax losses of retrieval against cross-entropies written out by row, on one rank and two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recsys.config import RetrievalSettings
from recsys.data.batch import Batch
from recsys.model.losses import RetrievalLoss
from recsys.ranking.vectors import TowerVectors
from tests.ranks import run_on_ranks
from tests.recsys.content.item_batches import batch_of_items

ITEMS = [5, 2, 5, 7, 2, 9]
LABELS = [1.0, 1, 0, 1, 1, 1]
PADDING_ROW = 5
NEGATIVES = [2, 3, 8, 7]
DIM = 3


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch() -> Batch:
    made = batch_of_items(ITEMS)
    positions = torch.arange(len(ITEMS))
    positions[PADDING_ROW] = -1
    return replace(
        made,
        labels=torch.tensor(LABELS).unsqueeze(1),
        row_positions=positions,
        target_log_q=random(10, seed=2)[made.target_items],
        negative_items=torch.tensor(NEGATIVES),
        negative_log_q=random(10, seed=2)[NEGATIVES],
    )


def towers() -> TowerVectors:
    return TowerVectors(
        random(len(ITEMS), 1, DIM, seed=3), random(10, DIM, seed=4)[ITEMS], random(4, DIM, seed=5)
    )


def loss_of(name: str, **settings: Any) -> RetrievalLoss:
    return RetrievalLoss(RetrievalSettings(loss=name, **settings), [1.0])  # type: ignore[arg-type]


def by_rows(candidates: Tensor, items: list[int], log_q: Tensor, used: list[int]) -> Tensor:
    """Cross-entropy of each positive row's item against the candidates that are other items."""
    made, vectors = batch(), towers()
    assert made.target_log_q is not None
    total = torch.zeros(())
    for row in used:
        own = vectors.query[row, 0] @ vectors.item[row] - made.target_log_q[row]
        others = [
            vectors.query[row, 0] @ candidate - log_q[place]
            for place, candidate in enumerate(candidates)
            if items[place] not in (ITEMS[row], None)
        ]
        scores = torch.stack([own, *others]).unsqueeze(0)
        total = total + F.cross_entropy(scores, torch.tensor([0]))
    return total / len(ITEMS)


POSITIVE_ROWS = [0, 1, 3, 4]


def test_in_batch_each_positive_is_set_against_the_other_items_of_the_batch() -> None:
    made = batch()
    assert made.target_log_q is not None
    items: list[Any] = [*ITEMS]
    items[PADDING_ROW] = None
    expected = by_rows(towers().item, items, made.target_log_q, POSITIVE_ROWS)
    torch.testing.assert_close(loss_of("in_batch_softmax")(towers(), made), expected)


def test_sampled_each_positive_is_set_against_the_drawn_items_but_for_itself() -> None:
    made, vectors = batch(), towers()
    assert made.negative_log_q is not None and vectors.negatives is not None
    expected = by_rows(vectors.negatives, NEGATIVES, made.negative_log_q, POSITIVE_ROWS)
    torch.testing.assert_close(loss_of("sampled_softmax")(vectors, made), expected)


def test_labels_are_weighted_and_each_has_its_own_query() -> None:
    made, vectors = batch(), towers()
    second = 1 - made.labels
    both = replace(made, labels=torch.cat([made.labels, second], dim=1))
    queries = torch.cat([vectors.query, vectors.query.flip(2)], dim=1)
    settings = RetrievalSettings(loss="in_batch_softmax")
    actual = RetrievalLoss(settings, [1.0, 3.0])(replace(vectors, query=queries), both)
    one = loss_of("in_batch_softmax")
    other = one(replace(vectors, query=vectors.query.flip(2)), replace(made, labels=second))
    torch.testing.assert_close(actual, one(vectors, made) + 3 * other)


def test_integer_weights_are_repeated_rows_against_drawn_items() -> None:
    made, vectors, times = batch(), towers(), torch.tensor([2, 1, 1, 3, 0, 0])
    rows = torch.arange(len(ITEMS)).repeat_interleave(times)
    assert made.target_log_q is not None
    repeated = replace(
        made,
        **{name: getattr(made, name)[rows] for name in ("labels", "target_items", "row_positions")},
        target_log_q=made.target_log_q[rows],
    )
    weighted = replace(made, weights=times / times.float().mean())
    of_rows = replace(vectors, query=vectors.query[rows], item=vectors.item[rows])
    loss = loss_of("sampled_softmax")
    torch.testing.assert_close(loss(vectors, weighted), loss(of_rows, repeated))


def test_a_batch_without_positives_has_no_loss() -> None:
    made = replace(batch(), labels=torch.zeros(len(ITEMS), 1))
    for name in ("in_batch_softmax", "sampled_softmax"):
        assert loss_of(name)(towers(), made) == 0


def with_gradients(name: str, vectors: TowerVectors, made: Batch, **settings: Any) -> list[Tensor]:
    """The loss, and its gradients by query, item and negatives."""
    leaves = [
        part.clone().requires_grad_() for part in (vectors.query, vectors.item, vectors.negatives)
    ]
    loss = loss_of(name, **settings)(TowerVectors(*leaves), made)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [loss.detach(), *(torch.zeros(1) if part is None else part for part in gradients)]


def half(rank: int, size: int) -> tuple[TowerVectors, Batch]:
    """A rank's rows, and its sampled negatives."""
    made, vectors = batch(), towers()
    assert vectors.negatives is not None
    assert made.negative_items is not None and made.negative_log_q is not None
    assert made.target_log_q is not None
    rows = slice(rank * 6 // size, (rank + 1) * 6 // size)
    drawn = slice(rank * 4 // size, (rank + 1) * 4 // size)
    part = replace(
        made,
        labels=made.labels[rows],
        target_items=made.target_items[rows],
        row_positions=made.row_positions[rows],
        target_log_q=made.target_log_q[rows],
        negative_items=made.negative_items[drawn],
        negative_log_q=made.negative_log_q[drawn],
    )
    return TowerVectors(vectors.query[rows], vectors.item[rows], vectors.negatives[drawn]), part


def on_a_rank(rank: int, size: int) -> dict[str, list[Tensor]]:
    return {
        name: with_gradients(name, *half(rank, size), all_ranks=True)
        for name in ("in_batch_softmax", "sampled_softmax")
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, list[Tensor]]]:
    return run_on_ranks(on_a_rank, 2)


@pytest.mark.parametrize("name", ["in_batch_softmax", "sampled_softmax"])
def test_with_the_negatives_of_all_ranks_two_ranks_equal_one(name: str, two_ranks: Any) -> None:
    """Losses of ranks are averaged, and with them the gradients of what they share."""
    expected = with_gradients(name, towers(), batch())
    first, second = (ran[name] for ran in two_ranks)
    torch.testing.assert_close((first[0] + second[0]) / 2, expected[0])
    for place in (1, 2, 3):
        both = torch.cat([first[place], second[place]]) / 2
        if expected[place].numel() > 1:
            torch.testing.assert_close(both, expected[place])
