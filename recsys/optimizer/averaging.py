"""Exponential moving average of the dense weights, through torch.optim.swa_utils.

The averages are validated, tested and kept as the best model in place of the weights that train.
Sharded tables are not averaged: most of their rows do not change in a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from recsys.config import OptimizerSettings
from recsys.optimizer.groups import dense_parameters


class AveragedWeights:
    """Averages of named parameters: average = decay * average + (1 - decay) * weight.

    The first update copies the weights.

    Args:
        parameters: those that train, by name.
        decay: in [0, 1).

    Example::

        averages = AveragedWeights(dict(model.named_parameters()), decay=0.999)
        averages.update()  # after each step of the optimizer
        with averages.in_place():
            evaluate(model)
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.names = list(parameters)
        self.weights = nn.ParameterList(parameters.values())
        self.averaged = AveragedModel(self.weights, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def update(self) -> None:
        """Take the weights after a step of the optimizer into the averages."""
        self.averaged.update_parameters(self.weights)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages in the place of the weights, and the weights back at the end.

        Before the first update the weights stay: they are the averages then.
        """
        if not int(self.averaged.n_averaged):
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        averages = self.averaged.module.parameters()
        for weight, average in zip(self.weights, averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Return averages by name and their number of updates, in the memory of this object."""
        averages = self.averaged.module.parameters()
        state = {name: value.detach() for name, value in zip(self.names, averages, strict=True)}
        return {**state, "num_updates": self.averaged.n_averaged}


def build_averages(model: nn.Module, settings: OptimizerSettings) -> AveragedWeights | None:
    """Return averages of a model's dense weights; None where `optimizer.ema_decay` is not set."""
    if settings.ema_decay is None:
        return None
    return AveragedWeights(dense_parameters(model), settings.ema_decay)
