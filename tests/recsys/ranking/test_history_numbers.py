"""What a history says by its parallel lists, against a loop over rows."""

from __future__ import annotations

import math

import pytest
import torch

from recsys.data.jagged_history import JaggedHistory
from recsys.ranking.layers.fields import HALF_LIVES, history_numbers, num_history_numbers

LENGTHS = torch.tensor([3, 0, 1])
HISTORY = JaggedHistory.of(torch.tensor([0, 1, 0, 2]), LENGTHS, num_items=3)


def test_ages_count_the_newer_items_of_the_same_row() -> None:
    assert HISTORY.ages.tolist() == [2, 1, 0, 0]


@pytest.mark.parametrize("num_parallel", [0, 1, 2])
def test_numbers_are_means_by_each_half_life_and_the_length(num_parallel: int) -> None:
    parallel = torch.rand(4, num_parallel, generator=torch.Generator().manual_seed(0))
    rows = []
    for own in parallel.split(LENGTHS.tolist()):
        numbers = []
        for column in range(num_parallel):
            for half_life in (math.inf, *HALF_LIVES):
                weights = [0.5 ** (age / half_life) for age in reversed(range(len(own)))]
                total = sum(w * float(v) for w, v in zip(weights, own[:, column]))
                numbers.append(total / sum(weights) if weights else 0.0)
        rows.append([*numbers, math.log(1 + len(own))])
    numbers = history_numbers(HISTORY, parallel)
    assert numbers.shape == (3, num_history_numbers(num_parallel))
    torch.testing.assert_close(numbers, torch.tensor(rows))


def test_a_very_long_history_has_finite_numbers() -> None:
    history = JaggedHistory.of(torch.zeros(5000, dtype=torch.int64), torch.tensor([5000]), 1)
    liked = torch.zeros(5000, 1)
    liked[-1] = 1
    numbers = history_numbers(history, liked)[0]
    expected = [1 / 5000, *(1 - 0.5 ** (1 / life) for life in HALF_LIVES), math.log(5001)]
    torch.testing.assert_close(numbers, torch.tensor(expected))
