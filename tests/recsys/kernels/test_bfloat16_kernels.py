"""Kernels under autocast equal PyTorch whose matrix products have rounded factors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recsys.data.jagged_history import JaggedHistory
from recsys.kernels.choice import _KernelChoice
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
TOLERANCE = 1e-4
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
        item_map, target_map, difference_map, product_map = first.weight.T.chunk(4)
        item_map, target_map = item_map + difference_map, target_map - difference_map
        rows = []
        for row, index in enumerate(history.index.split(history.lengths.tolist())):
            one, vectors = target[row : row + 1], items[index]
            constant = RoundedProduct.apply(one, target_map) + first.bias
            if len(index) < 4:  # rows without a matrix of their own
                pairs = torch.cat([vectors, vectors * one], dim=1)
                hidden = RoundedProduct.apply(pairs, torch.cat([item_map, product_map]))
            else:
                hidden = RoundedProduct.apply(vectors, item_map + one.T * product_map)
            units = rounded_linear((hidden + constant).relu(), second.weight, second.bias).relu()
            scores = (units * last.weight).sum(dim=1) + last.bias
            rows.append(scores.softmax(dim=0) @ vectors)
        return torch.stack(rows)


def attention_results(case: str) -> tuple[TargetAttention, Inputs, Any]:
    attention, inputs = attention_case(*CASES[case])
    torch.set_num_threads(1)
    with IN_BFLOAT16:
        return attention, inputs, output_and_gradients(attention, inputs)


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    for name, value in expected.items():
        if name.endswith(("score.4.bias", "key.bias")):
            continue  # shift all scores of a softmax, so that their gradient is rounding alone
        error = (actual[name] - value).abs().flatten().tolist()
        scale = max([1e-2, *value.abs().flatten().tolist()])
        assert max([0.0, *error]) < tolerance * scale, name


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name][3] == 0])
def test_attention_equals_pytorch_with_rounded_factors(case: str) -> None:
    attention, inputs, actual = attention_results(case)
    expected = output_and_gradients(RoundedAttention(attention), inputs)
    assert_same(actual, expected)


@pytest.mark.parametrize("case", FUSION_CASES)
def test_fusion_equals_pytorch_with_rounded_factors(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    fusion_case = Case(*FUSION_CASES[case])
    with monkeypatch.context() as context:  # under autocast the output would be rounded, too
        context.setattr("recsys.kernels.operators.rounds_products", lambda device: True)
        actual = fusion_case.results()
    monkeypatch.setattr(_KernelChoice, "kernels", "torch")
    monkeypatch.setattr(nn.functional, "linear", rounded_linear)
    has_many = len(fusion_case.tokens) > 10
    assert_same(actual, fusion_case.results(), SAME_OF_MANY if has_many else TOLERANCE)


@pytest.mark.parametrize("case", ["long ones", "wide"])
def test_attention_with_lists_is_close_to_float32_but_not_equal(case: str) -> None:
    attention, inputs, actual = attention_results(case)
    for name, value in output_and_gradients(attention, inputs).items():
        if value.any():
            assert 0 < float((actual[name] - value).norm() / value.norm()) < 0.03, name
