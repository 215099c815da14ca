"""FLOPs that PyTorch counts of parts, against numbers by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from recsys.diagnostics.cost.counted import WorkCounter, item_cost
from recsys.diagnostics.cost.work import FLOAT
from recsys.kernels import (
    ScoreWeights,
    has_native,
    native_dot_interaction,
    native_target_attention,
)


class Attention(nn.Module):
    """Self-attention of one head without weights, behind one linear map: [1, T, 4] -> [1, T, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.map(x)
        return (x @ x.transpose(1, 2)) @ x


@pytest.mark.parametrize("first", [1, 2])
def test_cost_at_any_length_follows_from_three_short_ones(first: int) -> None:
    def tokens(length: int) -> list[Tensor]:
        return [torch.empty(1, length, 4, device="meta")]

    cost, sizes = item_cost(Attention(), tokens, range(first, first + 3))
    items, length = 5, 7
    forward, backward = cost.on(items, items * length, items * length**2)

    assert sizes == [first, first + 1, first + 2]
    assert forward.products == items * length * 2 * 4 * 4
    assert forward.others == items * 2 * length**2 * 4 * 2
    assert forward.bytes == FLOAT * (items * length * (4 + 4) + 4 * 4)
    assert forward.outputs == FLOAT * items * length * 4
    assert backward.products == forward.products  # gradient of the weights alone
    assert backward.others == 2 * forward.others
    assert backward.bytes == FLOAT * (items * length * (4 + 4) + 2 * 4 * 4)


def test_of_frozen_layers_there_is_no_backward_and_nothing_kept() -> None:
    layers = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).requires_grad_(False)
    cost, _ = item_cost(layers, lambda n: [torch.empty(n, 4, device="meta")], (1, 2, 3))
    forward, backward = cost.on(0, 10)

    assert forward.products == 10 * 2 * (4 * 3 + 3 * 2)
    assert backward.flops == backward.bytes == 0
    with torch.no_grad(), WorkCounter() as counter:
        layers(torch.ones(10, 4))
    assert counter.work().products == forward.products
    assert counter.work().outputs == 0


def test_a_share_of_the_items_has_a_backward() -> None:
    cost, _ = item_cost(nn.Linear(4, 4), lambda n: [torch.empty(n, 4, device="meta")], (1, 2, 3))
    whole, half = cost.on(0, 8), cost.on(0, 8, trained_share=0.5)

    assert half[0] == whole[0]
    assert half[1].flops == whole[1].flops / 2


def test_work_of_kernels_is_that_of_their_mathematics() -> None:
    if not has_native(torch.zeros(1)):
        pytest.skip("no C++ compiler")
    dense, sparse = torch.randn(5, 4, requires_grad=True), torch.randn(5, 3, 4, requires_grad=True)
    with WorkCounter() as counter:
        native_dot_interaction(dense, sparse).sum().backward()
    pairs, directions = 4 * 3 // 2, 3
    assert counter.work().others == directions * 5 * pairs * 2 * 4

    mlp = nn.Sequential(nn.Linear(4 * 4, 6), nn.ReLU(), nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 1))
    target, items = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4)
    index, offsets, nothing = torch.tensor([0, 2, 0]), torch.tensor([0, 2, 3]), torch.zeros(3, 0)
    with WorkCounter() as counter:
        native_target_attention(
            target, items, index, offsets, nothing, torch.zeros(4, 0), ScoreWeights.of(mlp)
        ).sum().backward()
    of_places, of_rows = 3 * 2 * (4 * 6 + 6 * 2 + 2 + 4), 2 * 4 * 4 * 6
    assert counter.work().flops == directions * (of_places + of_rows)
