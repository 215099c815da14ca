"""Kernels refuse inputs whose shapes do not fit together: they would read memory behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recsys.content.fusion import FusionQFormer

pytestmark = pytest.mark.usefixtures("native_kernels")

OFFSETS = torch.tensor([0, 2, 3])
INDEX = torch.tensor([0, 2, 0])


def inputs_of(operator: str) -> list[Any]:
    """Inputs that fit: B 2, U 3, N 3, D 4, H 6, G 5, P 1; fusion of 3 items with 2 tokens."""
    if operator == "target_attention":
        vectors = [torch.rand(2, 4), torch.rand(3, 4), INDEX, OFFSETS, torch.rand(3, 1)]
        weights = [torch.rand(6, 16), torch.rand(6), torch.rand(5, 6), torch.rand(5)]
        return [*vectors, torch.rand(4, 1), *weights, torch.rand(1, 5), torch.rand(1), True, False]
    if operator == "content_interest":
        vectors = [torch.rand(2, 2, 4), torch.rand(3, 4), torch.eye(4), INDEX, OFFSETS]
        return [*vectors, torch.rand(2, 1), torch.rand(3, 1)]
    if operator == "in_batch_contrastive":
        items = torch.tensor([5, 6])
        return [torch.rand(2, 4), torch.rand(2, 4), items, torch.ones(()), True, True]
    if operator == "few_token_attention":
        mask = torch.ones(3, 2, dtype=torch.bool)
        return [torch.rand(3, 2, 4), torch.rand(3, 2, 4), torch.rand(3, 2, 4), mask, 2, 0.5]
    fusion = FusionQFormer(4, 2, num_queries=2, num_layers=1, num_heads=2)
    tokens, mask = torch.rand(3, 2, 4), torch.ones(3, 2, dtype=torch.bool)
    noise = torch.rand(2 * 3 * 2 * 4)
    return [tokens, mask, torch.tensor([0, 1]), noise, fusion.weights(), 1, 2, 0.5, 0.1, False]


def shorter(tensor: Tensor) -> Tensor:
    return tensor[..., :-1]


@pytest.mark.parametrize(
    ("operator", "places"),
    [
        ("target_attention", [1, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("content_interest", [1, 2, 4, 5, 6]),
        ("in_batch_contrastive", [1, 2]),
        ("few_token_attention", [1, 2, 3]),
        ("fusion", [1, 2, 3]),
    ],
)
def test_an_input_that_is_too_small_is_refused(operator: str, places: list[int]) -> None:
    compute = getattr(torch.ops.recsys, operator)
    compute(*inputs_of(operator))  # these fit
    for place in places:
        inputs = inputs_of(operator)
        inputs[place] = shorter(inputs[place])
        with pytest.raises(RuntimeError, match=r"shape|narrow"):
            compute(*inputs)


def test_each_weight_of_the_fusion_has_its_shape() -> None:
    for place in range(len(inputs_of("fusion")[4])):
        inputs = inputs_of("fusion")
        inputs[4][place] = shorter(inputs[4][place])
        with pytest.raises(RuntimeError, match="shape"):
            torch.ops.recsys.fusion(*inputs)


def test_tokens_of_another_width_than_the_fusion_s_are_refused() -> None:
    fusion = FusionQFormer(4, 2, num_queries=2, num_layers=1, num_heads=2)
    with pytest.raises(RuntimeError, match="shape"):
        fusion(torch.rand(3, 2, 6), torch.ones(3, 2, dtype=torch.bool), torch.tensor([0, 1]))
