"""Target attention against a loop over rows and their unpadded histories."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recsys.ranking.target_attention import TargetAttention, pad_history

DIM, NUM_PARALLEL = 4, 2
LENGTHS = torch.tensor([2, 0, 3, 1])


def inputs(num_parallel: int = NUM_PARALLEL) -> tuple[Tensor, Tensor, Tensor]:
    """target [B, D], history [N, D] and parallel lists [N, P]."""
    generator = torch.Generator().manual_seed(0)
    total = int(LENGTHS.sum())
    return (
        torch.randn(len(LENGTHS), DIM, generator=generator).requires_grad_(),
        torch.randn(total, DIM, generator=generator).requires_grad_(),
        torch.rand(total, num_parallel, generator=generator).round(),
    )


def attention_of(num_parallel: int = NUM_PARALLEL) -> TargetAttention:
    torch.manual_seed(1)
    return TargetAttention(DIM, num_parallel, [6, 3])


def by_loop(
    attention: TargetAttention, target: Tensor, history: Tensor, parallel: Tensor
) -> Tensor:
    rows, start = [], 0
    for row, length in enumerate(LENGTHS.tolist()):
        own, flags = history[start : start + length], parallel[start : start + length]
        start += length
        scores, items = [], []
        for item, flag in zip(own, flags, strict=True):
            if attention.parallel_map is not None:
                item = item + attention.parallel_map.weight @ flag
            pair = torch.cat([item, target[row], item - target[row], item * target[row]])
            scores.append(attention.score(pair)[0])
            items.append(item)
        interest, mean = torch.zeros(DIM), torch.zeros(parallel.shape[1])
        if length:
            weights = torch.exp(torch.stack(scores))
            weights = weights / weights.sum()
            interest = sum(w * item for w, item in zip(weights, items))  # type: ignore[assignment]
            mean = flags.mean(0)
        rows.append(torch.cat([interest, mean, torch.tensor([math.log(1 + length)])]))
    return torch.stack(rows)


@pytest.mark.parametrize("num_parallel", [0, 1, 2])
def test_attention_equals_a_loop_over_unpadded_histories(num_parallel: int) -> None:
    attention = attention_of(num_parallel)
    target, history, parallel = inputs(num_parallel)
    variables = [target, history, *attention.parameters()]
    output = attention(target, *pad_history(history, parallel, LENGTHS))
    expected = by_loop(attention, target, history, parallel)
    assert output.shape == (len(LENGTHS), attention.output_dim)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    factor = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((output * factor).sum(), variables)
    wanted = torch.autograd.grad((expected * factor).sum(), variables)
    torch.testing.assert_close(gradients, wanted, atol=1e-5, rtol=1e-4)


def test_an_empty_history_gives_zeros() -> None:
    attention = attention_of()
    target, history, parallel = inputs()
    output = attention(target, *pad_history(history, parallel, LENGTHS))
    assert not output[1].any()


def test_a_batch_without_any_history_gives_zeros_and_finite_gradients() -> None:
    attention = attention_of()
    target, history, parallel = inputs()
    nothing = torch.zeros_like(LENGTHS)
    output = attention(target, *pad_history(history[:0], parallel[:0], nothing))
    output.sum().backward()
    assert output.shape == (len(LENGTHS), attention.output_dim)
    assert not output.any()
    for parameter in attention.parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()


def test_what_lies_in_the_padding_does_not_matter() -> None:
    attention = attention_of()
    target, history, parallel = inputs()
    padded, flags, mask = pad_history(history, parallel, LENGTHS)
    garbage = torch.where(mask.unsqueeze(-1), padded, 100.0)
    other_flags = torch.where(mask.unsqueeze(-1), flags, 7.0)
    assert torch.equal(
        attention(target, garbage, other_flags, mask), attention(target, padded, flags, mask)
    )


def test_pad_history_puts_each_row_s_items_first_and_zeros_behind() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    parallel = torch.tensor([[0.5], [1.0], [0.25]])
    padded, lists, mask = pad_history(values, parallel, torch.tensor([1, 0, 2]))
    assert padded.tolist() == [[[1, 2], [0, 0]], [[0, 0], [0, 0]], [[3, 4], [5, 6]]]
    assert lists.tolist() == [[[0.5], [0]], [[0], [0]], [[1.0], [0.25]]]
    assert mask.tolist() == [[True, False], [False, False], [True, True]]


def test_pad_history_of_nothing_is_one_masked_place() -> None:
    padded, lists, mask = pad_history(torch.zeros(0, 2), torch.zeros(0, 1), torch.tensor([0, 0]))
    assert padded.shape == (2, 1, 2) and lists.shape == (2, 1, 1)
    assert not mask.any() and not padded.any()
