"""Wrappers show in print(model) and leave names, weights and classes as they were."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from recsys.content.wrap import unwrap, wrap


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Shifted(nn.Module):
    shift: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


def test_a_wrapper_shows_in_print_and_changes_no_name() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    names, x = list(model.state_dict()), torch.randn(4, 2)
    expected = 2 * model[0](x)
    wrap(model[0], Doubled)
    assert repr(model).splitlines()[1].strip().startswith("(0): DoubledLinear(in_features=2")
    assert list(model.state_dict()) == names and isinstance(model[0], nn.Linear)
    assert torch.equal(model[0](x), expected)


def test_wrappers_nest_in_the_order_they_are_put_on_and_come_off_again() -> None:
    layer, x = nn.Linear(2, 2), torch.randn(3, 2)
    plain = layer(x)
    wrap(layer, Doubled)
    wrap(layer, Shifted)
    layer.shift = 1.0  # type: ignore[assignment]
    assert type(layer).__name__ == "ShiftedDoubledLinear"
    assert torch.equal(layer(x), 2 * plain + 1)
    assert torch.equal(copy.deepcopy(layer)(x), 2 * plain + 1)
    unwrap(layer, Shifted)
    assert torch.equal(layer(x), 2 * plain)
    unwrap(layer, Doubled)
    assert type(layer) is nn.Linear
