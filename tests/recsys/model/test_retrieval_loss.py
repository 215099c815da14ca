"""Softmax losses of retrieval against cross-entropies written out by row, on one rank and two."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recsys.config import RetrievalSettings
from recsys.data.batch import Batch, Negatives, Rows, TargetItems
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
    plain = batch_of_items(ITEMS)
    positions = torch.arange(len(ITEMS))
    positions[PADDING_ROW] = -1
    return replace(
        plain,
        labels=torch.tensor(LABELS).unsqueeze(1),
        rows=replace(plain.rows, positions=positions),
        target=replace(plain.target, log_q=random(10, seed=2)[plain.target.items]),
        negatives=Negatives(torch.tensor(NEGATIVES), random(10, seed=2)[NEGATIVES]),
    )


def towers() -> TowerVectors:
    return TowerVectors(
        random(len(ITEMS), 1, DIM, seed=3), random(10, DIM, seed=4)[ITEMS], random(4, DIM, seed=5)
    )


def loss_of(name: str, **settings: Any) -> RetrievalLoss:
    return RetrievalLoss(RetrievalSettings(loss=name, **settings), [1.0])  # type: ignore[arg-type]


def by_rows(candidates: Tensor, items: list[Any], log_q: Tensor, positives: list[int]) -> Tensor:
    """Cross-entropy of each positive row's item against the candidates that are other items."""
    rows, vectors = batch(), towers()
    assert rows.target.log_q is not None
    total = torch.zeros(())
    for row in positives:
        positive = vectors.query[row, 0] @ vectors.item[row] - rows.target.log_q[row]
        negatives = [
            vectors.query[row, 0] @ candidate - log_q[index]
            for index, candidate in enumerate(candidates)
            if items[index] not in (ITEMS[row], None)
        ]
        scores = torch.stack([positive, *negatives]).unsqueeze(0)
        total = total + F.cross_entropy(scores, torch.tensor([0]))
    return total / len(ITEMS)


POSITIVE_ROWS = [0, 1, 3, 4]


def test_in_batch_each_positive_is_set_against_the_other_items_of_the_batch() -> None:
    rows = batch()
    assert rows.target.log_q is not None
    items: list[Any] = [*ITEMS]
    items[PADDING_ROW] = None
    expected = by_rows(towers().item, items, rows.target.log_q, POSITIVE_ROWS)
    torch.testing.assert_close(loss_of("in_batch_softmax")(towers(), rows), expected)


def test_sampled_each_positive_is_set_against_the_drawn_items_but_for_itself() -> None:
    rows, vectors = batch(), towers()
    assert rows.negatives is not None and vectors.negatives is not None
    expected = by_rows(vectors.negatives, NEGATIVES, rows.negatives.log_q, POSITIVE_ROWS)
    torch.testing.assert_close(loss_of("sampled_softmax")(vectors, rows), expected)


HISTORIES = [[8, 3], [], [3], [2, 2, 7], [11], [3]]


@pytest.mark.parametrize("name", ["in_batch_softmax", "sampled_softmax", "full_softmax"])
def test_items_of_a_row_s_history_are_no_negatives_of_it(name: str) -> None:
    rows, vectors = batch(), towers()
    rows = replace(rows, history=batch_of_items(ITEMS, HISTORIES).history)
    assert rows.negatives is not None and rows.target.log_q is not None
    candidates, items, log_q = vectors.item, ITEMS, rows.target.log_q
    if name != "in_batch_softmax":
        assert vectors.negatives is not None
        candidates, items, log_q = vectors.negatives, NEGATIVES, rows.negatives.log_q
    masked = [
        [None if item in history else item for item in items]
        for item, history in zip(ITEMS, HISTORIES)
    ]
    if name == "in_batch_softmax":
        masked = [[*items[:PADDING_ROW], None] for items in masked]
    expected = sum(by_rows(candidates, masked[row], log_q, [row]) for row in POSITIVE_ROWS)
    torch.testing.assert_close(loss_of(name, exclude_seen=True)(vectors, rows), expected)
    assert loss_of(name)(vectors, rows) > expected  # fewer negatives, smaller losses


def test_labels_are_weighted_and_each_has_its_own_query() -> None:
    rows, vectors = batch(), towers()
    second = 1 - rows.labels
    two_labels = replace(rows, labels=torch.cat([rows.labels, second], dim=1))
    queries = torch.cat([vectors.query, vectors.query.flip(2)], dim=1)
    settings = RetrievalSettings(loss="in_batch_softmax")
    actual = RetrievalLoss(settings, [1.0, 3.0])(replace(vectors, query=queries), two_labels)
    one = loss_of("in_batch_softmax")
    other = one(replace(vectors, query=vectors.query.flip(2)), replace(rows, labels=second))
    torch.testing.assert_close(actual, one(vectors, rows) + 3 * other)


def test_a_batch_without_positives_has_no_loss() -> None:
    rows = replace(batch(), labels=torch.zeros(len(ITEMS), 1))
    for name in ("in_batch_softmax", "sampled_softmax"):
        assert loss_of(name)(towers(), rows) == 0


def with_gradients(name: str, vectors: TowerVectors, rows: Batch, **settings: Any) -> list[Tensor]:
    """The loss, and its gradients by query, item and negatives."""
    leaves = [
        leaf.clone().requires_grad_() for leaf in (vectors.query, vectors.item, vectors.negatives)
    ]
    loss = loss_of(name, **settings)(TowerVectors(*leaves), rows)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [loss.detach(), *(torch.zeros(1) if leaf is None else leaf for leaf in gradients)]


def half(rank: int, size: int) -> tuple[TowerVectors, Batch]:
    """A rank's rows, and its sampled negatives."""
    all_rows, vectors = batch(), towers()
    assert vectors.negatives is not None
    assert all_rows.negatives is not None and all_rows.target.log_q is not None
    rows = slice(rank * 6 // size, (rank + 1) * 6 // size)
    drawn = slice(rank * 4 // size, (rank + 1) * 4 // size)
    mine = replace(
        all_rows,
        labels=all_rows.labels[rows],
        rows=Rows(all_rows.rows.positions[rows], all_rows.rows.groups[rows]),
        target=TargetItems(all_rows.target.items[rows], log_q=all_rows.target.log_q[rows]),
        negatives=Negatives(all_rows.negatives.items[drawn], all_rows.negatives.log_q[drawn]),
    )
    return TowerVectors(vectors.query[rows], vectors.item[rows], vectors.negatives[drawn]), mine


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
    for index in (1, 2, 3):
        joined = torch.cat([first[index], second[index]]) / 2
        if expected[index].numel() > 1:
            torch.testing.assert_close(joined, expected[index])
