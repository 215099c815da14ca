"""The history map against v W0 + (alpha / r) v A B, and what each of its modes trains."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn

from recsys.config import HistorySettings
from recsys.content.history_map import HistoryMap

DIM, RANK, ALPHA = 5, 2, 6.0
Mode = Literal["bank_lora", "bank_frozen", "bank_dense", "full"]
MODES: list[Mode] = ["bank_lora", "bank_frozen", "bank_dense", "full"]


def history_map(mode: Mode) -> HistoryMap:
    torch.manual_seed(0)
    return HistoryMap(DIM, HistorySettings(mode=mode, lora_rank=RANK, lora_alpha=ALPHA))


def adapters(module: HistoryMap) -> tuple[nn.Parameter, nn.Parameter]:
    layer: Any = module.map
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def test_lora_is_the_frozen_map_plus_the_scaled_low_rank_one() -> None:
    module = history_map("bank_lora")
    layer: Any = module.map
    a, b = adapters(module)  # [r, D] and [D, r]
    with torch.no_grad():
        layer.base_layer.weight.normal_()
        a.normal_()
        b.normal_()
    v = torch.randn(7, DIM, requires_grad=True)
    w0 = layer.base_layer.weight.detach().T
    a_by_hand = a.detach().T.clone().requires_grad_()  # [D, r]
    b_by_hand = b.detach().T.clone().requires_grad_()  # [r, D]
    expected = v @ w0 + (ALPHA / RANK) * v @ a_by_hand @ b_by_hand
    output = module(v)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)

    output.square().sum().backward()
    expected.square().sum().backward()
    assert a.grad is not None and b.grad is not None
    assert a_by_hand.grad is not None and b_by_hand.grad is not None
    torch.testing.assert_close(a.grad, a_by_hand.grad.T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(b.grad, b_by_hand.grad.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_starts_as_the_identity(mode: Mode) -> None:
    vectors = torch.randn(4, DIM)
    assert torch.equal(history_map(mode)(vectors), vectors)


@pytest.mark.parametrize(
    ("mode", "trained"),
    [
        ("bank_frozen", set()),
        ("bank_lora", {"map.lora_A.default.weight", "map.lora_B.default.weight"}),
        ("bank_dense", {"map.weight"}),
        ("full", {"map.weight"}),
    ],
)
def test_each_mode_trains_exactly_its_parameters(mode: Mode, trained: set[str]) -> None:
    parameters = history_map(mode).named_parameters()
    assert {name for name, parameter in parameters if parameter.requires_grad} == trained


def test_training_moves_the_adapters_and_leaves_the_frozen_map_bit_equal() -> None:
    module = history_map("bank_lora")
    layer: Any = module.map
    before = layer.base_layer.weight.detach().clone()
    a_before, b_before = (part.detach().clone() for part in adapters(module))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (module(torch.randn(4, DIM)) - 1).square().sum().backward()
        optimizer.step()
    a, b = adapters(module)
    assert torch.equal(layer.base_layer.weight, before)
    assert not torch.equal(a, a_before)
    assert not torch.equal(b, b_before)
