"""Kernels under autocast equal PyTorch whose matrix products have rounded factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recsys.data.jagged_history import JaggedHistory
from recsys.kernels.choice import _Chosen
from recsys.ranking.layers.target_attention import TargetAttention
from tests.recsys.kernels.test_fusion_kernel import CASES as FUSION_CASES
from tests.recsys.kernels.test_fusion_kernel import Case
from tests.recsys.kernels.test_native_kernels import (
    CASES,
    Inputs,
    attention_case,
    output_and_gradients,
)

pytestmark = [
    pytest.mark.usefixtures("native_kernels"),
    pytest.mark.skipif(
        not torch.cpu._is_avx512_bf16_supported(),
        reason="this processor has no avx512_bf16: kernels compute in float32 here",
    ),
]
IN_BFLOAT16 = torch.autocast("cpu", torch.bfloat16)
SAME = 1e-4
# Sums are taken in another order: of many factors, some are rounded to their other neighbour.
SAME_OF_MANY = 3e-3


def rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


class RoundedProduct(torch.autograd.Function):
    """a @ b with both factors rounded, in the backward, too."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return rounded(a) @ rounded(b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return rounded(gradient) @ rounded(b).T, rounded(a).T @ rounded(gradient)


def rounded_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = RoundedProduct.apply(inputs.flatten(0, -2), weight.T).unflatten(0, inputs.shape[:-1])
    return product if bias is None else product + bias


class RoundedAttention(nn.Module):
    """Target attention, row by row: the reference of the kernel's products."""

    def __init__(self, attention: TargetAttention) -> None:
        super().__init__()
        self.score = attention.score

    def forward(self, target: Tensor, items: Tensor, history: JaggedHistory, _: Tensor) -> Tensor:
        first, second, last = self.score[::2]
        of_item, of_target, of_difference, of_product = first.weight.T.chunk(4)
        of_item, of_target = of_item + of_difference, of_target - of_difference
        rows = []
        for row, index in enumerate(history.index.split(history.lengths.tolist())):
            one, vectors = target[row : row + 1], items[index]
            constant = RoundedProduct.apply(one, of_target) + first.bias
            if len(index) < 4:  # rows without a matrix of their own
                pairs = torch.cat([vectors, vectors * one], dim=1)
                hidden = RoundedProduct.apply(pairs, torch.cat([of_item, of_product]))
            else:
                hidden = RoundedProduct.apply(vectors, of_item + one.T * of_product)
            units = rounded_linear((hidden + constant).relu(), second.weight, second.bias).relu()
            scores = (units * last.weight).sum(dim=1) + last.bias
            rows.append(scores.softmax(dim=0) @ vectors)
        return torch.stack(rows)


def attention_results(case: str, threads: int = 1) -> tuple[TargetAttention, Inputs, Any]:
    attention, inputs = attention_case(*CASES[case])
    torch.set_num_threads(threads)
    with IN_BFLOAT16:
        return attention, inputs, output_and_gradients(attention, inputs)


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = SAME
) -> None:
    for name, value in expected.items():
        if name.endswith(("score.4.bias", "key.bias")):
            continue  # shift all scores of a softmax, so that their gradient is rounding alone
        error = (found[name] - value).abs().flatten().tolist()
        scale = max([1e-2, *value.abs().flatten().tolist()])
        assert max([0.0, *error]) < tolerance * scale, name


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name][3] == 0])
def test_attention_equals_pytorch_with_rounded_factors(case: str) -> None:
    attention, inputs, found = attention_results(case)
    expected = output_and_gradients(RoundedAttention(attention), inputs)
    assert_same(found, expected)


@pytest.mark.parametrize("case", FUSION_CASES)
def test_fusion_equals_pytorch_with_rounded_factors(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    these = Case(*FUSION_CASES[case])
    with monkeypatch.context() as context:  # under autocast the output would be rounded, too
        context.setattr("recsys.kernels.fusion.rounds_products", lambda device: True)
        found = these.results()
    monkeypatch.setattr(_Chosen, "kernels", "torch")
    monkeypatch.setattr(nn.functional, "linear", rounded_linear)
    of_many = len(these.tokens) > 10
    assert_same(found, these.results(), SAME_OF_MANY if of_many else SAME)


@pytest.mark.parametrize("case", ["long ones", "wide"])
def test_attention_with_lists_is_close_to_float32_but_not_equal(case: str) -> None:
    attention, inputs, found = attention_results(case)
    for name, value in output_and_gradients(attention, inputs).items():
        if value.any():
            assert 0 < float((found[name] - value).norm() / value.norm()) < 0.03, name


@pytest.mark.parametrize("case", ["short and empty histories", "long ones"])
def test_attention_is_equal_to_the_last_bit_for_one_thread_and_two(case: str) -> None:
    _, _, one = attention_results(case)
    _, _, two = attention_results(case, threads=2)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_row_s_interest_does_not_depend_on_the_rows_beside_it() -> None:
    attention, (target, items, history, parallel) = attention_case([3, 40, 2], 6, [9, 5], 1, 30)
    alone = JaggedHistory.of(history.index[3:43], torch.tensor([40]), 30)
    with torch.no_grad(), IN_BFLOAT16:
        together = attention(target, items, history, parallel)
        assert torch.equal(together[1:2], attention(target[1:2], items, alone, parallel[3:43]))


def test_what_is_not_a_number_stays_one() -> None:
    attention, inputs = attention_case([2, 0, 20], 4, [6, 3], 1, 4)
    inputs[0][2, 1] = float("nan")
    with IN_BFLOAT16:
        found = output_and_gradients(attention, inputs)
    assert found["output"][2].isnan().all()
    assert not found["output"][:2].isnan().any()
