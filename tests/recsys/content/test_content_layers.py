"""Layers of the content branch: history map, projection and dropout."""

from typing import Any, Literal

import pytest
import torch
from torch import nn

from recsys.config import HistorySettings
from recsys.content.branch import HistoryMap, Projection
from recsys.content.dropout import Dropout
from recsys.model.inputs import IDDropout

DIM, RANK, ALPHA = 5, 2, 6.0
Mode = Literal["bank_lora", "bank_frozen", "bank_dense", "full"]


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


@pytest.mark.parametrize(
    ("mode", "trained"),
    [
        ("bank_frozen", set()),
        ("bank_lora", {"map.lora_A.default.weight", "map.lora_B.default.weight"}),
        ("bank_dense", {"map.weight"}),
        ("full", {"map.weight"}),
    ],
)
def test_each_mode_starts_as_the_identity_and_trains_exactly_its_parameters(
    mode: Mode, trained: set[str]
) -> None:
    module, vectors = history_map(mode), torch.randn(4, DIM)
    assert torch.equal(module(vectors), vectors)
    parameters = module.named_parameters()
    assert {name for name, parameter in parameters if parameter.requires_grad} == trained


def test_it_is_a_linear_map_of_shifted_and_scaled_inputs() -> None:
    projection, inputs = Projection(6, 4), torch.randn(3, 5, 6)
    plain = nn.Linear(6, 4)
    plain.load_state_dict(dict(projection.named_parameters()))
    assert torch.equal(projection(inputs), plain(inputs))

    projection.shift.copy_(torch.arange(6.0))
    projection.scale.fill_(0.5)

    assert torch.equal(projection(inputs), plain((inputs - torch.arange(6.0)) * 0.5))


def test_a_share_p_is_dropped_and_the_rest_scaled_so_that_the_mean_stays() -> None:
    torch.manual_seed(0)
    output = Dropout(0.3)(torch.ones(1000, 100))
    dropped = (output == 0).float().mean()
    assert abs(float(dropped) - 0.3) < 0.01
    torch.testing.assert_close(output[output != 0].unique(), torch.tensor([1 / 0.7]))


def test_id_dropout_leaves_out_whole_vectors_and_scales_nothing() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(10_000, 3, requires_grad=True)
    output = IDDropout(0.3)(vectors)
    is_dropped = (output == 0).all(dim=1)
    assert abs(float(is_dropped.float().mean()) - 0.3) < 0.02
    assert torch.equal(output[~is_dropped], vectors[~is_dropped])
    output.sum().backward()
    assert torch.equal(vectors.grad, (~is_dropped).float().unsqueeze(1).expand(-1, 3))
