"""Optimizers by name and of one's own: their options, and a state that survives a checkpoint."""

from typing import Any

import pytest
import torch
from torch import nn

from recsys.config import OptimizerSettings
from recsys.optimizer import (
    DenseGroup,
    build_dense_optimizer,
    count_state,
    make_room,
    numbers_loaded,
    state_tensors,
)

GROUPS = [DenseGroup("all", [""], learning_rate=0.1, weight_decay=0.3)]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adam": {"amsgrad": True},
    "sgd": {},
    "sgd with momentum": {"momentum": 0.9, "nesterov": True},
    "adafactor": {},
    f"{__name__}:Counting": {"rate_share": 0.5},
}


class Counting(torch.optim.Optimizer):
    """An optimizer of one's own, whose state has Python numbers and a tensor."""

    def __init__(self, params: Any, rate_share: float) -> None:
        super().__init__(params, {"rate_share": rate_share})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state.setdefault("count", 0)
                state.setdefault("sum", 0.0)
                state.setdefault("last", torch.zeros_like(parameter))
                state["count"] += 1
                state["sum"] += float(parameter.grad.sum())
                rate = group["lr"] * group["rate_share"] / state["count"]
                parameter -= rate * (parameter.grad + state["last"] + state["sum"])
                state["last"] = parameter.grad.clone()


def small_model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def built(model: nn.Module, name: str) -> torch.optim.Optimizer:
    settings = OptimizerSettings(name=name.split(" ")[0], options=OPTIMIZERS.get(name, {}))
    return build_dense_optimizer(model, GROUPS, settings)[1]


def take_steps(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 4)[None]).square().sum().backward()
        optimizer.step()


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adamw", torch.optim.AdamW),
        ("adam", torch.optim.Adam),
        ("sgd with momentum", torch.optim.SGD),
        ("adafactor", torch.optim.Adafactor),
    ],
)
def test_a_named_optimizer_steps_as_torch_s(name: str, reference: Any) -> None:
    model, plain = small_model(), small_model()
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    biases = [p for p in plain.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": biases, "weight_decay": 0.0}]
    take_steps(built(model, name), model, 3)
    take_steps(reference(groups, lr=0.1, **OPTIMIZERS[name]), plain, 3)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_from_its_state_to_the_last_bit(name: str) -> None:
    model = small_model()
    optimizer = built(model, name)
    take_steps(optimizer, model, 2)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    saved = {key: value.clone() for key, value in state_tensors(optimizer, names_of(model)).items()}
    take_steps(optimizer, model, 2)

    resumed = small_model()
    resumed.load_state_dict(weights)
    fresh = built(resumed, name)
    sizes = {key: (value.size(), value.dtype) for key, value in saved.items()}
    room = make_room(fresh, names_of(resumed), sizes)
    assert room.keys() == saved.keys()
    for key, value in room.items():
        value.copy_(saved[key])
    numbers_loaded(fresh)
    take_steps(fresh, resumed, 2)
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (OptimizerSettings(name="adamv"), r"optimizer\.name 'adamv' is unknown.*'adafactor'"),
        (OptimizerSettings(options={"momentum": 1}), r"optimizer\.name .*momentum"),
        (OptimizerSettings(options={"lr": 1}), r"optimizer\.options\.lr: "),
        (OptimizerSettings(name="torch.nn:Linear"), r"optimizer\.name 'torch\.nn:Linear'"),
    ],
)
def test_what_cannot_be_an_optimizer_is_refused(settings: OptimizerSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_dense_optimizer(small_model(), GROUPS, settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (OptimizerSettings(), {"weight": 2 * 12, "bias": 2 * 4}),
        (OptimizerSettings(name="sgd"), {"weight": 0, "bias": 0}),
        (OptimizerSettings(name="sgd", options={"momentum": 0.9}), {"weight": 12, "bias": 4}),
        # One row, one column, for a vector its squares.
        (OptimizerSettings(name="adafactor"), {"weight": 3 + 4, "bias": 4}),
        (OptimizerSettings(ema_decay=0.9), {"weight": 3 * 12, "bias": 3 * 4}),
    ],
)
def test_the_state_of_an_optimizer_is_counted_by_parameter(
    settings: OptimizerSettings, expected: dict[str, int]
) -> None:
    sizes = {"weight": torch.Size([4, 3]), "bias": torch.Size([4])}
    assert count_state(settings, sizes) == expected
