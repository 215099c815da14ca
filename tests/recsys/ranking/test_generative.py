"""A beam search finds what scoring every item finds, and codes of items stay when others come."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recsys.config import ranking_settings
from recsys.model.build import build_ranking
from recsys.model.losses import CodeLoss
from recsys.ranking.generative import (
    CodeDecoder,
    CodeTrie,
    Generative,
    add_codes,
    beam_search,
    code_table,
)
from recsys.ranking.vectors import CodeLogits
from tests.recsys.ranking.ranking_inputs import CONTENT, DIMENSIONS, inputs

NUM_ITEMS, NUM_CODES, DIM = 60, 8, 16


def random_codes(num_items: int = NUM_ITEMS) -> np.ndarray:
    """Two codes of each item, which many items share."""
    return np.random.default_rng(0).integers(0, [5, 4], size=(num_items, 2))


def decoder_of(levels: int = 2) -> CodeDecoder:
    torch.manual_seed(0)
    decoder = CodeDecoder(DIM, heads=2, layers=2, levels=levels, codes=NUM_CODES)
    nn.init.normal_(decoder.places)  # else tokens of places are alike
    return decoder.eval()


def every_score(decoder: CodeDecoder, table: np.ndarray, states: Tensor) -> Tensor:  # [Q, I]
    """The reference: each item's codes are read in one pass."""
    rows = [torch.from_numpy(row).expand(len(states), -1) for row in table]
    with torch.no_grad():
        return torch.stack([decoder(states, row) for row in rows], dim=1)


def test_items_that_share_their_codes_are_numbered_and_keep_their_numbers() -> None:
    codes = np.array([[1, 2], [0, 2], [1, 2], [1, 2], [3, 0]])
    table = code_table(codes)
    assert table.tolist() == [[1, 2, 0, 3], [0, 2, 0, 1], [1, 2, 1, 3], [1, 2, 2, 3], [3, 0, 0, 1]]
    assert code_table(codes[:0]).shape == (0, 4)

    every = random_codes()
    grown = add_codes(code_table(every[:35]), every[35:])
    assert np.array_equal(grown[:35, :3], code_table(every[:35])[:, :3])
    assert len(np.unique(grown[:, :3], axis=0)) == NUM_ITEMS
    # Items of a catalogue need not have all numbers of their group.
    equal = grown[grown[:, 2] > 0]
    assert len(np.unique(add_codes(equal, every)[:, :3], axis=0)) == len(equal) + NUM_ITEMS


def test_the_trie_has_the_items_and_no_other_path() -> None:
    table = code_table(random_codes())
    trie, index_by_path = CodeTrie(table), {}
    for path in itertools.product(range(5), range(4), range(NUM_CODES)):
        node = torch.zeros(1, dtype=torch.long)
        for level, code in enumerate(path):
            children, _ = trie.children(level, node)
            node = children[trie.codes[level][children] == code]
        if len(node):
            index_by_path[path] = int(trie.items[node])
    assert index_by_path == {tuple(row[:3]): index for index, row in enumerate(table.tolist())}


@pytest.mark.parametrize("levels", [1, 2])
def test_a_beam_as_wide_as_the_catalogue_equals_exhaustive_scoring(levels: int) -> None:
    codes = random_codes()[: NUM_CODES if levels == 1 else None, :levels]
    decoder, table = decoder_of(levels), code_table(codes)
    states = torch.randn(5, DIM)
    expected = every_score(decoder, table, states)
    best, order = expected.sort(dim=1, descending=True)

    scores, indices = beam_search(decoder, CodeTrie(table), states, len(table))

    torch.testing.assert_close(scores, best, rtol=0, atol=1e-5)
    assert torch.equal(indices, order)
    assert (expected.exp().sum(dim=1) < 1).all() and expected.std(dim=1).min() > 0.1
    alone = beam_search(decoder, CodeTrie(table), states[3:4], len(table))
    torch.testing.assert_close(alone[0], scores[3:4], rtol=0, atol=1e-5)


def test_a_narrow_beam_finds_items_with_their_scores_in_order() -> None:
    decoder, table, states = decoder_of(), code_table(random_codes()), torch.randn(5, DIM)
    expected = every_score(decoder, table, states)
    scores, indices = beam_search(decoder, CodeTrie(table), states, 6)
    torch.testing.assert_close(scores, expected.gather(1, indices), rtol=0, atol=1e-5)
    assert (scores.diff(dim=1) <= 0).all() and len(indices[0].unique()) == 6


def test_items_that_a_user_has_seen_are_no_results() -> None:
    decoder, table, states = decoder_of(), code_table(random_codes()), torch.randn(3, DIM)
    is_seen = torch.rand(3, NUM_ITEMS) < 0.4
    is_seen[2] = True
    scores, indices = beam_search(decoder, CodeTrie(table), states, NUM_ITEMS, is_seen)
    for row in range(3):
        results = indices[row][indices[row] >= 0]
        assert sorted(results.tolist()) == (~is_seen[row]).nonzero().flatten().tolist()
    assert (indices[2] == -1).all() and torch.isinf(scores[2]).all()
    empty = beam_search(decoder, CodeTrie(table[:0]), states, 4)
    assert (empty[1] == -1).all()


def test_an_item_alone_has_no_unlikely_last_code() -> None:
    """A new item that shares its codes with none costs nothing at the last level."""
    decoder, states = decoder_of(), torch.randn(2, DIM)
    table = code_table(np.array([[0, 1], [2, 2], [2, 2]]))
    scores = every_score(decoder, table, states)
    first, cache = decoder.step(decoder.start(states), None, 0)
    zeros = torch.zeros(2, dtype=torch.long)
    tokens, cache_state = decoder.follow(cache, torch.arange(2), 0, zeros)
    second, _ = decoder.step(tokens, cache_state, 1)
    torch.testing.assert_close(scores[:, 0], (first[:, 0] + second[:, 1]).detach())


def generative(**settings: Any) -> Generative:
    torch.manual_seed(0)
    settings = {"sequence_dim": 8, "code_levels": 2, "num_codes": 4} | settings
    model = build_ranking(ranking_settings("generative", **settings), DIMENSIONS, CONTENT)
    assert isinstance(model, Generative)
    return model.eval()


def test_without_semantic_ids_codes_are_the_digits_of_the_row() -> None:
    table = generative().table
    assert [int(4 * second + first) for first, second in table[:, :2]] == list(range(9))
    assert (table[:, 2] == 0).all() and (table[:, 3] == 1).all()


def test_with_semantic_ids_a_table_may_have_more_rows_than_digits_tell_apart() -> None:
    model = generative(semantic_ids="codes", code_levels=1, num_codes=2)
    assert (model.table == -1).all()
    model.set_codes(np.array([3, 8]), np.array([[1], [1]]))
    assert model.table[[3, 8]].tolist() == [[1, 0, 2], [1, 1, 2]]


def test_an_item_without_codes_is_never_likely_and_has_no_gradient() -> None:
    model, (ids, content, batch) = generative(), inputs()
    model.set_codes(np.array([0, 2]), np.array([[1, 3], [1, 3]]))
    batch.target.items = torch.tensor([2, 1, 30])  # the last has no row of the table
    batch.labels = torch.ones(3, 1)

    scored = model(ids, content, batch)
    loss = CodeLoss(2.0)(scored, batch)

    assert scored.logits[1:].tolist() == [[-100.0], [-100.0]] and scored.logits[0] > -50
    torch.testing.assert_close(loss, -2 * scored.log_probs[0] / 3)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_rows_count_by_label_and_weight() -> None:
    scored = CodeLogits(
        torch.zeros(4, 1, 2), -torch.arange(1.0, 5), torch.ones(4, dtype=torch.bool)
    )
    _, _, batch = inputs(torch.tensor([1, 1, 1, 1]))
    batch.labels = torch.tensor([[1.0], [0.0], [float("nan")], [1.0]])
    batch.rows.weights = torch.tensor([1.0, 1.0, 1.0, 0.5])
    assert CodeLoss(1.0)(scored, batch) == pytest.approx((1 + 0.5 * 4) / 4)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((9, 3), int), "3 codes up to 0"),
        (np.full((9, 2), 4), "2 codes up to 4"),
        (np.zeros((9, 2), int), "9 items share all 2 codes, and the last one tells 4 apart"),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generative().set_codes(np.arange(9), codes)
