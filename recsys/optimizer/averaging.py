"""Exponential moving average of the dense weights, through torch.optim.swa_utils.

The averages replace the trained weights in validation, test and the best model. Sharded tables are
not averaged: most of their rows do not change in a step.
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
        parameters: trained parameters, by name.
        decay: in [0, 1).

    Example::

        from torch import nn
        from recsys.optimizer import AveragedWeights

        model = nn.Linear(2, 1)
        averages = AveragedWeights(dict(model.named_parameters()), decay=0.999)
        averages.update()  # after each step of the optimizer
        with averages.in_place():
            model.eval()  # evaluate here
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        """Make a copy of the parameters for the averages."""
        self.names = list(parameters)
        self.weights = nn.ParameterList(parameters.values())
        self.averaged = AveragedModel(self.weights, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def update(self) -> None:
        """Update the averages with the weights after a step of the optimizer."""
        self.averaged.update_parameters(self.weights)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the weights by the averages inside the block, and restore them at its end.

        Before the first update the weights stay, since there are no averages yet.
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
        """Exchange weights and averages."""
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
    """Return averages of a model's dense weights; None if `optimizer.ema_decay` is not set."""
    if settings.ema_decay is None:
        return None
    return AveragedWeights(dense_parameters(model), settings.ema_decay)
