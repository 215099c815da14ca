"""Votes by opinions: hand values, the own group left out, and what a package computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys.config import ranking_settings
from recsys.data.jagged_history import JaggedHistory
from recsys.model.build import build_ranking
from recsys.ranking.layers.collaborative_filtering import CollaborativeFiltering
from recsys.serving.ranking_graph import RankingGraph
from tests.recsys.ranking.ranking_inputs import DIMENSIONS, inputs

# Three items and two groups of users: 1 is valued as 0 is, 2 the other way round.
OPINIONS = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])


def votes_of(
    opinions: Tensor, values: list[float], user: int, training: bool = False, dropout: float = 0.0
) -> Tensor:
    """Votes of a row with history (1, 2) and target 0, whose prior values are all 0."""
    votes = CollaborativeFiltering(column=0, num_items=3, num_groups=2, dropout=dropout).train(
        training
    )
    votes.fill(opinions, mean=0.0, deviation=1.0)
    _, _, batch = inputs(torch.tensor([2]))
    batch.history.items = torch.tensor([1, 2])
    batch.history.values = torch.tensor(values).unsqueeze(1)
    batch.rows.groups = torch.tensor([user])
    return votes(batch.history.jagged(), batch)[0]


def test_votes_have_their_hand_values() -> None:
    # The mean (7 + 0) / (2 + 5 prior values) is 1; opinions have length sqrt(2), similarity +-2/3.
    votes = votes_of(OPINIONS, [7.0, 0.0], user=0)
    positive, relative = 2 / 3, (6.0, -1.0)
    expected = [
        positive * relative[0] / (positive + 0.3),
        positive**2 * relative[0] / (positive**2 + 0.05),
        (positive * relative[0] - positive * relative[1]) / 3**0.5,
        torch.log1p(torch.tensor(positive)),
    ]
    torch.testing.assert_close(votes, torch.tensor(expected))


def test_a_row_in_training_leaves_out_the_group_of_its_own_user() -> None:
    """With what its own group thinks of the target changed, training gives the same votes."""
    changed = OPINIONS.clone()
    changed[0, 3 % 2] = 2.0  # user 3 is in group 1
    pair = (OPINIONS, changed)
    votes = [votes_of(opinions, [1.0, 0.0], user=3, training=True) for opinions in pair]
    torch.testing.assert_close(*votes)
    scored = [votes_of(opinions, [1.0, 0.0], user=3) for opinions in pair]
    assert not torch.allclose(*scored)


def test_a_target_that_counts_as_new_in_training_gets_no_votes() -> None:
    assert not votes_of(OPINIONS, [7.0, 0.0], user=0, training=True, dropout=1.0).any()
    assert votes_of(OPINIONS, [7.0, 0.0], user=0, dropout=1.0).any()


def test_without_history_or_opinions_all_votes_are_0() -> None:
    votes = CollaborativeFiltering(column=0, num_items=3, num_groups=2)
    _, _, batch = inputs(torch.tensor([0, 2]))
    batch.history.items = torch.tensor([1, 7])  # 7: an item added to a package
    assert (votes(batch.history.jagged(), batch) == 0).all()


def test_long_histories_lose_no_digits_so_that_a_package_agrees() -> None:
    values = torch.tensor([0.8, 0.9, 0.6]).repeat(100)
    history = JaggedHistory.of(torch.arange(300), torch.tensor([300]), 300)
    votes = CollaborativeFiltering(column=0, num_items=300, num_groups=2)
    votes.fill(torch.ones(300, 2), mean=0.7, deviation=0.2)
    exact, mean, deviation = values.double(), votes.mean.double(), votes.deviation.double()
    expected = (exact - (exact.sum() + 5 * mean) / 305) / deviation
    actual = votes._relative_values(history, values)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6)


def test_new_opinions_replace_only_those_that_have_rows() -> None:
    votes = CollaborativeFiltering(column=0, num_items=3, num_groups=2)
    votes.fill(OPINIONS, mean=0.5, deviation=1.0)
    votes.fill(torch.tensor([[0.0, 3.0], [0.0, 0.0], [0.0, 0.0]]), mean=0.25, deviation=2.0)
    assert votes.opinions[0].tolist() == [1.0, 3.0]
    assert votes.opinions[2].tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("name", ["din_dcn", "sim"])
def test_a_package_computes_the_votes_of_the_model(name: str) -> None:
    settings = ranking_settings(name, opinions="liked", opinion_groups=4)
    torch.manual_seed(0)
    model = build_ranking(settings, replace(DIMENSIONS, num_items=9), None).eval()
    model.opinion_votes.fill(torch.randn(9, 4), mean=0.5, deviation=0.5)
    ids, _, batch = inputs(torch.tensor([3]))
    values, targets = batch.history.values, torch.tensor([4])
    batch.target.items = targets
    expected = model(ids, None, batch)
    graph = RankingGraph(model)
    none = torch.zeros(1, 0)
    arguments = [ids.pooled, batch.dense_features, ids.target, ids.history, values, targets]
    scored = graph(*arguments, batch.history.items, none, torch.zeros(3, 0), none)
    torch.testing.assert_close(scored, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_items": 9}, "'stars'.*liked"), ({"parallel_names": ("stars",)}, "bounded")],
)
def test_opinions_need_a_list_and_items_with_rows_of_their_own(
    changes: dict[str, Any], message: str
) -> None:
    settings = ranking_settings("din", opinions="stars")
    with pytest.raises(ValueError, match=message):
        build_ranking(settings, replace(DIMENSIONS, **changes), None)
