"""SIM: what is found in a history, against a loop; attention and ages against plain PyTorch."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys.data.batch import Batch
from recsys.data.jagged_history import JaggedHistory
from recsys.ranking.attention_models import AgedAttention, Sim, SimSettings
from recsys.ranking.layers.fields import num_history_numbers
from recsys.ranking.layers.sequence_encoder import age_row
from tests.recsys.ranking.ranking_inputs import CONTENT, DIMENSIONS, ID_DIM, inputs

SETTINGS = SimSettings(search_top_k=2, mlp_units=[8])
LENGTHS = torch.tensor([4, 0, 6])


def found_by(model: Sim, content: Any, ids: Any, batch: Batch) -> list[int]:
    return model.search(ids, content, batch.history.jagged()).tolist()


def best_by_loop(scores: list[list[float]], top_k: int) -> list[int]:
    """By row of scores the places of the highest, counted over all rows."""
    indices, first = [], 0
    for row in scores:
        best = sorted(range(len(row)), key=lambda index: row[index])[-top_k:]
        indices += [first + index for index in sorted(best)]
        first += len(row)
    return indices


@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_without_content_the_highest_dot_products_of_id_vectors_are_found(top_k: int) -> None:
    ids, _, batch = inputs(LENGTHS)
    model = Sim(replace(SETTINGS, search_top_k=top_k), DIMENSIONS, None)
    history = ids.history.split(LENGTHS.tolist())
    scores = [(items @ target).tolist() for target, items in zip(ids.target, history)]
    assert found_by(model, None, ids, batch) == best_by_loop(scores, top_k)


def test_groups_of_the_latest_items_are_refused() -> None:
    content = replace(CONTENT, history=replace(CONTENT.history, recent=[5]))
    with pytest.raises(ValueError, match=r"content.history.recent is \[5\].*sim"):
        Sim(SETTINGS, DIMENSIONS, content)


def test_with_content_the_highest_cosines_of_content_and_modalities_are_found() -> None:
    ids, content, batch = inputs(LENGTHS)
    history, modalities = content.read_history()
    spaces = [(content.target, history)]
    spaces += zip(content.target_modalities.unbind(1), modalities.unbind(1), strict=True)
    total: list[Tensor] = []
    for row, indices in enumerate(torch.arange(10).split(LENGTHS.tolist())):
        cosines = [
            torch.cosine_similarity(target[row], history[indices], dim=1)
            for target, history in spaces
        ]
        total.append(torch.stack(cosines).sum(0))
    expected = best_by_loop([row.tolist() for row in total], 2)
    assert found_by(Sim(SETTINGS, DIMENSIONS, CONTENT), content, ids, batch) == expected


def test_items_that_are_not_found_change_nothing() -> None:
    ids, content, batch = inputs(LENGTHS)
    model = Sim(SETTINGS, DIMENSIONS, CONTENT).eval()
    logits = model(ids, content, batch)
    indices = torch.tensor(found_by(model, content, ids, batch))
    is_found = torch.zeros(10, 1, dtype=torch.bool).index_fill_(0, indices, True)
    moved = replace(ids, history=torch.where(is_found, ids.history, 100.0))
    assert torch.equal(model(moved, content, batch), logits)
    moved = replace(ids, history=torch.where(is_found, 100.0, ids.history))
    assert not torch.allclose(model(moved, content, batch), logits)


def test_attention_to_found_items_is_plain_multi_head_attention_with_ages() -> None:
    torch.manual_seed(0)
    heads, dim = 2, ID_DIM
    attention = AgedAttention(dim, num_parallel=1, num_heads=heads)
    items, target = torch.randn(5, dim), torch.randn(1, dim)
    flags, ages = torch.tensor([[1.0], [0], [1], [0], [1]]), torch.tensor([3, 0, 2, 2, 1])
    assert attention.parallel_map is not None
    vectors = items + attention.ages.weight[ages] + attention.parallel_map(flags)
    interests = []
    for query in attention.query(target).view(heads, dim):
        weights = torch.softmax(vectors @ query / dim**0.5, dim=0)
        interests.append(weights @ vectors)
    expected = attention.output(torch.cat(interests))
    history = JaggedHistory.of(torch.arange(5), torch.tensor([5]), 5)
    torch.testing.assert_close(attention(target, items, history, flags, ages)[0], expected)


def test_an_age_is_the_logarithm_of_the_gap() -> None:
    assert age_row(torch.tensor([0, 1, 2, 3, 6, 7, 1e30])).tolist() == [0, 1, 1, 2, 2, 3, 31]


def test_ages_are_places_from_the_end_or_the_named_list() -> None:
    ids, _, batch = inputs(LENGTHS)
    gaps = torch.arange(10.0).unsqueeze(1) * 100
    batch.history.values = torch.cat([batch.history.values, gaps], dim=1)
    two_lists = replace(DIMENSIONS, num_parallel=2, parallel_names=("liked", "gap"))
    by_position, by_gap = (
        Sim(replace(SETTINGS, time_gaps=name), two_lists, None) for name in (None, "gap")
    )
    history = batch.history.jagged()
    assert by_position._ages(batch, history).tolist() == [2, 1, 1, 0, 2, 2, 2, 1, 1, 0]
    assert torch.equal(by_gap._ages(batch, history), age_row(gaps[:, 0]))
    # The gaps are no flags: there are the numbers of one list less.
    difference = num_history_numbers(2) - num_history_numbers(1)
    assert by_gap.feature_dim == by_position.feature_dim - difference
    assert by_gap(ids, None, batch).shape == (3, 1)
