"""Similarity features against a loop over groups."""

import pytest
import torch
from torch import Tensor

from recsys.config import HistorySettings
from recsys.content.vectors import ContentVectors
from recsys.data.jagged_history import JaggedHistory
from recsys.ranking.layers.content_interest import (
    ContentInterest,
    cosines,
    latest_flags,
    num_similarity_features,
    shared_similarity_features,
    similarity_features,
    similarity_histogram,
)

DIM = 3
LENGTHS = torch.tensor([4, 0, 1, 3])
HISTORY = JaggedHistory.of(torch.arange(8), LENGTHS, 8)


def inputs(num_flags: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_flags)
    total = int(LENGTHS.sum())
    return (
        torch.randn(len(LENGTHS), DIM, generator=generator).requires_grad_(),
        torch.randn(total, DIM, generator=generator).requires_grad_(),
        torch.rand(total, num_flags, generator=generator).round(),
    )


def by_loop(target: Tensor, history: Tensor, flags: Tensor) -> Tensor:
    """Means, then maxima, of all, with and without each flag; then each flag's vote."""
    rows, start, num_flags = [], 0, flags.shape[1]
    for row, length in enumerate(LENGTHS.tolist()):
        vectors, row_flags = history[start : start + length], flags[start : start + length]
        start += length
        cosines = [v @ target[row] / (v.norm() * target[row].norm()) for v in vectors]
        groups = [list(range(length))]
        groups += [[i for i in range(length) if row_flags[i, f] == 1] for f in range(num_flags)]
        groups += [[i for i in range(length) if row_flags[i, f] == 0] for f in range(num_flags)]
        zero = torch.zeros(())
        means = [torch.stack([cosines[i] for i in g]).mean() if g else zero for g in groups]
        maxima = [torch.stack([cosines[i] for i in g]).max() if g else zero for g in groups]
        weights = torch.tensor([])
        if length:
            weights = torch.stack([torch.exp(cosine / 0.1) for cosine in cosines])
            weights = weights / weights.sum()
        votes = [(weights * row_flags[:, f]).sum() for f in range(num_flags)]
        rows.append(torch.stack([*means, *maxima, *votes]))
    return torch.stack(rows)


@pytest.mark.parametrize("num_flags", [0, 1, 2])
def test_similarity_features_equal_a_loop_over_the_groups(num_flags: int) -> None:
    target, history, flags = inputs(num_flags)
    cosine = cosines(target, history, HISTORY).unsqueeze(1)
    features = similarity_features(cosine, HISTORY, flags)
    expected = by_loop(target, history, flags)
    assert features.shape == (len(LENGTHS), num_similarity_features(num_flags))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    factor = torch.randn(features.shape, generator=torch.Generator().manual_seed(9))
    gradients = torch.autograd.grad((features * factor).sum(), [target, history])
    expected_gradients = torch.autograd.grad((expected * factor).sum(), [target, history])
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [0, 5])
def test_one_history_of_all_rows_has_the_features_of_as_many_copies(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    cosine = torch.rand(2, 3, length, generator=generator) * 2 - 1  # two spaces, three rows
    flags = torch.rand(length, 2, generator=generator).round()
    copies = torch.tensor([length] * 3)
    history = JaggedHistory.of(torch.arange(length).repeat(3), copies, length)
    expected = similarity_features(cosine.flatten(1).T, history, flags.repeat(3, 1))
    torch.testing.assert_close(shared_similarity_features(cosine, flags), expected)


def features_of(target: Tensor, items: Tensor, lengths: list[int], flags: Tensor) -> Tensor:
    history = JaggedHistory.of(torch.arange(len(items)), torch.tensor(lengths), len(items))
    return similarity_features(cosines(target, items, history).unsqueeze(1), history, flags)


def test_groups_without_items_give_zero_even_where_all_others_are_dissimilar() -> None:
    target = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    features = features_of(target, torch.tensor([[-1.0, 0.0]]), [1, 0], torch.ones(1, 1))
    # Means and maxima of all, liked, others; then the vote.
    assert features[0].tolist() == [-1.0, -1.0, 0.0, -1.0, -1.0, 0.0, 1.0]
    assert not features[1].any()


def test_a_list_that_is_no_flag_is_split_at_a_half_and_voted_by_its_values() -> None:
    target = torch.tensor([[1.0, 0.0]])
    history = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    hours = torch.tensor([[30.0], [10.0], [0.0]])
    features = features_of(target, history, [3], hours)
    expected = [2 / 3, 1.0, 0.0, 1.0, 1.0, 0.0, 20.0]
    torch.testing.assert_close(features, torch.tensor([expected]), atol=1e-2, rtol=1e-5)


def test_an_item_never_written_to_the_bank_is_similar_to_nothing() -> None:
    features = features_of(torch.ones(1, 2), torch.zeros(1, 2), [1], torch.ones(1, 1))
    assert features.tolist() == [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]


def test_the_histogram_counts_cosines_by_tier() -> None:
    cosine = torch.tensor([-1.0, -0.1, 0.1, 1.0, 0.6, 0.0, 0.0, -0.6])
    histogram = similarity_histogram(cosine, HISTORY, bins=4)  # -1 to -.5, to 0, to .5, to 1
    counts = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 2, 0]])
    assert torch.equal(histogram, torch.log1p(counts))


def test_the_latest_items_of_a_row_are_flagged() -> None:
    flags = latest_flags(HISTORY, [1, 3])
    assert flags[:, 0].tolist() == [0, 0, 0, 1, 1, 0, 0, 1]  # of rows of 4, 0, 1 and 3 items
    assert flags[:, 1].tolist() == [0, 1, 1, 1, 1, 1, 1, 1]


def test_flags_of_the_latest_items_have_the_features_of_lists_beside_the_history() -> None:
    target, items, lists = inputs(1)
    tensors = (
        target,
        items,
        items.unsqueeze(1)[:4].repeat(1, 2, 1),
        items.unsqueeze(1).repeat(1, 2, 1),
    )
    content = ContentVectors(*tensors)
    flagging = ContentInterest(DIM, 2, 1, HistorySettings(recent=[1, 3]))
    reading = ContentInterest(DIM, 2, 3, HistorySettings())
    reading.load_state_dict(flagging.state_dict())
    listed = torch.cat([lists, latest_flags(HISTORY, [1, 3])], dim=1)
    torch.testing.assert_close(
        flagging(content, HISTORY, lists), reading(content, HISTORY, listed), rtol=0, atol=0
    )
