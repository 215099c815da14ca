"""Target attention against a loop over rows and their unpadded histories."""

import math

import pytest
import torch
from torch import Tensor

from recsys.data.jagged_history import JaggedHistory
from recsys.ranking.layers.target_attention import (
    DotAttention,
    HistoryAttention,
    MeanOfEvents,
    TargetAttention,
)

DIM, NUM_PARALLEL, NUM_ITEMS = 4, 2, 4
LENGTHS = torch.tensor([2, 0, 3, 1])
INDEX = torch.tensor([3, 0, 3, 3, 1, 0])  # item 2 is in no history
HISTORY = JaggedHistory.of(INDEX, LENGTHS, NUM_ITEMS)
KINDS = ["DIN", "dot", "mean"]


def inputs(num_parallel: int = NUM_PARALLEL) -> tuple[Tensor, Tensor, Tensor]:
    """target [B, D], items [U, D] and parallel lists [N, P]."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(len(LENGTHS), DIM, generator=generator).requires_grad_(),
        torch.randn(NUM_ITEMS, DIM, generator=generator).requires_grad_(),
        torch.rand(len(INDEX), num_parallel, generator=generator).round(),
    )


def attention_of(kind: str, num_parallel: int = NUM_PARALLEL) -> HistoryAttention:
    torch.manual_seed(1)
    if kind == "DIN":
        return TargetAttention(DIM, num_parallel, [6, 3])
    return DotAttention(DIM, num_parallel) if kind == "dot" else MeanOfEvents(DIM, num_parallel)


def score_of(attention: HistoryAttention, item: Tensor, target: Tensor) -> Tensor:
    if isinstance(attention, TargetAttention):
        return attention.score(torch.cat([item, target, item - target, item * target]))[0]
    if isinstance(attention, MeanOfEvents):
        return 0 * target.sum()
    assert isinstance(attention, DotAttention)
    return attention.query(target) @ item / math.sqrt(DIM)


def by_loop(attention: HistoryAttention, target: Tensor, items: Tensor, parallel: Tensor) -> Tensor:
    rows, start = [], 0
    for row, length in enumerate(LENGTHS.tolist()):
        row_slice = slice(start, start + length)
        start += length
        events = items[INDEX[row_slice]]
        if attention.parallel_map is not None:
            events = events + parallel[row_slice] @ attention.parallel_map.weight.T
        if length:
            scores = torch.stack([score_of(attention, item, target[row]) for item in events])
            rows.append(scores.softmax(dim=0) @ events)
        else:
            rows.append(torch.zeros(DIM))
    return torch.stack(rows)


@pytest.mark.parametrize("num_parallel", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_equals_a_loop_over_unpadded_histories(kind: str, num_parallel: int) -> None:
    attention = attention_of(kind, num_parallel)
    target, items, parallel = inputs(num_parallel)
    variables = [target, items, *attention.parameters()]
    output = attention(target, items, HISTORY, parallel)
    expected = by_loop(attention, target, items, parallel)
    assert output.shape == (len(LENGTHS), DIM)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    factor = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(
        (output * factor).sum(), variables, allow_unused=True, materialize_grads=True
    )
    expected_gradients = torch.autograd.grad((expected * factor).sum(), variables)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-4)
