"""Optimizers of dense parameters, and the schedules of their rates."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from recsys.config import OptimizerSettings
from recsys.distributed.pipeline import DenseUpdate
from recsys.optimizer import (
    AveragedWeights,
    DenseGroup,
    LearningRateShare,
    build_dense_optimizer,
)
from recsys.optimizer.dense import count_state, make_room, restore_numbers, state_tensors
from recsys.optimizer.schedules import set_updates

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
    restore_numbers(fresh)
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


def halved(step: int, decay_steps: int, every: int) -> float:
    """A schedule of one's own."""
    return 0.5 ** (step // every)


def shares(settings: OptimizerSettings, steps: int) -> list[float]:
    share = LearningRateShare(settings)
    return [share(step) for step in range(steps)]


def test_rates_rise_to_the_configured_one_and_stay() -> None:
    assert shares(OptimizerSettings(warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert shares(OptimizerSettings(warmup_steps=0), 2) == [1.0, 1.0]


def test_linear_decay_ends_at_its_final_share_and_stays_there() -> None:
    settings = OptimizerSettings(
        schedule="linear", warmup_steps=2, decay_steps=4, schedule_options={"final_share": 0.2}
    )
    expected = [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
    assert shares(settings, 8) == pytest.approx(expected, abs=1e-12)


def rates(schedule: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def test_cosine_decay_is_that_of_torch_after_warm_up() -> None:
    optimizer, plain = (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3) for _ in range(2))
    settings = OptimizerSettings(schedule="cosine", warmup_steps=3, decay_steps=5)
    schedules = [LinearLR(plain, 1 / 3, 1.0, 2), CosineAnnealingLR(plain, 5)]
    expected = rates(SequentialLR(plain, schedules, [3]), plain, 8)
    schedule = LambdaLR(optimizer, LearningRateShare(settings))
    assert rates(schedule, optimizer, 8) == pytest.approx(expected)


def test_without_decay_steps_decay_ends_with_the_last_epoch() -> None:
    share = LearningRateShare(OptimizerSettings(schedule="linear", warmup_steps=2))
    share.end_at(12)
    assert (share(2), share(7), share(12)) == (1.0, 0.5, 0.0)
    fixed = LearningRateShare(OptimizerSettings(schedule="linear", warmup_steps=2, decay_steps=5))
    fixed.end_at(100)
    assert fixed(7) == 0.0


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", f"{__name__}:halved"])
def test_rates_can_be_set_to_those_after_any_number_of_updates(schedule: str) -> None:
    options = {"every": 3} if ":" in schedule else {}
    settings = OptimizerSettings(
        schedule=schedule, schedule_options=options, warmup_steps=2, decay_steps=6
    )
    optimizer, resumed = (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3) for _ in range(2))
    expected = rates(LambdaLR(optimizer, LearningRateShare(settings)), optimizer, 10)
    going_on = LambdaLR(resumed, LearningRateShare(settings))
    set_updates(going_on, 4)
    assert rates(going_on, resumed, 6) == expected[4:]  # to the last bit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (OptimizerSettings(schedule="cosinus"), r"optimizer\.schedule 'cosinus' is unknown"),
        (
            OptimizerSettings(schedule="cosine", schedule_options={"final": 0.1}),
            r"optimizer\.schedule 'cosine' .*'final'",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings: OptimizerSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningRateShare(settings)


def update_of(weight: nn.Parameter, clip_norm: float | None) -> DenseUpdate:
    sgd = torch.optim.SGD([weight], lr=1.0)
    keyed = KeyedOptimizerWrapper({"weight": weight}, lambda _: sgd)
    return DenseUpdate(CombinedOptimizer([keyed]), sgd, clip_norm)


@pytest.mark.parametrize(("clip_norm", "step"), [(None, 5.0), (2.0, 2.0), (7.0, 5.0)])
def test_a_gradient_is_clipped_and_its_norm_before_that_is_told(
    clip_norm: float | None, step: float
) -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, -4.0])
    update = update_of(weight, clip_norm)
    update.step()
    assert float(update.gradient_norm()) == pytest.approx(5.0)
    expected = torch.tensor([-3.0, 4.0]) * step / 5.0
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_averages_follow_the_weights_with_their_decay_and_stand_in_for_them() -> None:
    weight = nn.Parameter(torch.zeros(1))
    averages = AveragedWeights({"weight": weight}, decay=0.25)
    with averages.in_place():  # nothing is averaged yet
        assert float(weight) == 0.0
    for value in (4.0, 8.0, 12.0):
        with torch.no_grad():
            weight.fill_(value)
        averages.update()
    early = 2 / 11  # the decay of the second update: (1 + n) / (10 + n) after n = 1
    expected = 0.25 * (early * 4.0 + (1 - early) * 8.0) + 0.75 * 12.0
    with pytest.raises(KeyError), averages.in_place():
        assert math.isclose(float(weight), expected, rel_tol=1e-6)
        raise KeyError
    assert float(weight) == 12.0
    state = averages.state_dict()
    assert (
        math.isclose(float(state["weight"]), expected, rel_tol=1e-6)
        and int(state["num_updates"]) == 3
    )
