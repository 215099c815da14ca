"""Build the optimizer of the dense parameters: one of torch.optim, or a user's class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim import CombinedOptimizer, KeyedOptimizerWrapper

from recsys.config import OptimizerSettings
from recsys.config.named_parts import make_part
from recsys.optimizer.groups import DenseGroup, dense_parameters, parameter_groups

OPTIMIZERS = {
    "adamw": "torch.optim:AdamW",
    "adam": "torch.optim:Adam",
    "sgd": "torch.optim:SGD",
    "adafactor": "torch.optim:Adafactor",
}
# One kernel over all parameters: on CPU the default is a Python loop over small operations.
_FUSED = ("adamw", "adam", "sgd")


def build_dense_optimizer(
    model: nn.Module, groups: Sequence[DenseGroup], settings: OptimizerSettings | None = None
) -> tuple[CombinedOptimizer, Optimizer]:
    """Build the optimizer of all dense parameters, and join it with the fused ones of tables.

    Args:
        model: a DistributedModelParallel, or any module for training without sharding.
        groups: a parameter belongs to the first group with a matching prefix. Frozen parameters are
            left out.
        settings: `name` and `options` of the optimizer, AdamW by default. A user's class
            (`package.module:Class`) is a torch.optim.Optimizer; it is called with the parameter
            groups, each with `lr` and `weight_decay`, and with the options.

    Returns:
        The optimizer to step, and the dense one inside it for schedules and checkpoints. Each of
        its parameter groups has the ``name`` of its DenseGroup.

    Raises:
        ValueError: a table would be in the dense optimizer, a parameter fits no group, no dense
            parameter is trainable, or the optimizer cannot be built.

    Example::

        from torch import nn
        from recsys.optimizer import DenseGroup, build_dense_optimizer

        optimizer, adamw = build_dense_optimizer(nn.Linear(2, 1), [DenseGroup("all", [""])])
        optimizer.step()  # with tables in the model, their fused optimizers are part of it
    """
    settings = settings or OptimizerSettings()
    parameters = dense_parameters(model)
    if not parameters:
        raise ValueError("the model has no trainable parameter outside its tables; unfreeze some")
    made = parameter_groups(model, parameters, groups)
    ordered = {name: parameters[name] for group in made for name in group.pop("names")}
    dense = _make(settings, made)
    keyed = KeyedOptimizerWrapper(ordered, lambda _: dense)
    if isinstance(model, DistributedModelParallel):
        return CombinedOptimizer([model.fused_optimizer, keyed]), dense
    return CombinedOptimizer([keyed]), dense


def _make(settings: OptimizerSettings, groups: list[dict[str, Any]]) -> Optimizer:
    """Build the optimizer of the groups."""
    for name in ("lr", "weight_decay"):
        if name in settings.options:
            raise ValueError(
                f"optimizer.options.{name}: each group of parameters has its own; set "
                "optimizer.learning_rate, content_learning_rate, encoder_learning_rate and "
                "weight_decay instead"
            )
    options = {"fused": True, **settings.options} if settings.name in _FUSED else settings.options
    return make_part("optimizer.name", settings.name, OPTIMIZERS, Optimizer, groups, **options)


def count_state(settings: OptimizerSettings, sizes: Mapping[str, torch.Size]) -> dict[str, int]:
    """Count the elements that the optimizer and the moving average keep, by parameter.

    It takes one step on parameters of these sizes: on the meta device, or, for an optimizer that
    reads values (Adafactor), on zeros on the host.

    Args:
        settings: settings of the optimizer.
        sizes: sizes of the parameters, by name.

    Raises:
        ValueError: the optimizer cannot be built.
    """
    unfused = replace(settings, options={**settings.options, "fused": False})
    settings = unfused if settings.name in _FUSED else settings
    try:
        state = _state_after_a_step(settings, sizes, "meta")
    except (RuntimeError, NotImplementedError):
        state = _state_after_a_step(settings, sizes, "cpu")
    average = settings.ema_decay is not None
    return {name: count + average * sizes[name].numel() for name, count in state.items()}


def _state_after_a_step(
    settings: OptimizerSettings, sizes: Mapping[str, torch.Size], device: str
) -> dict[str, int]:
    """Return the number of state elements of each parameter after one step."""
    parameters = {name: nn.Parameter(torch.zeros(s, device=device)) for name, s in sizes.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = _make(settings, [{"params": list(parameters.values()), "lr": 1e-3}])
    optimizer.step()
    return {
        name: sum(
            value.numel()
            for value in optimizer.state.get(parameter, {}).values()
            if isinstance(value, Tensor) and value.dim()
        )
        for name, parameter in parameters.items()
    }


def gradient_norm(optimizer: Optimizer) -> Tensor:  # []
    """Return the norm of the gradients of all parameters together."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
