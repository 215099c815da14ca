"""Standardises dense columns and lists with a training value outside of [-3, 3].

Mean and variance are those of the training rows; a warm-started run averages the last `HORIZON`.
Shapes: B batch, F dense features, N history items of the batch, P lists, W numbers in all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from recsys.data.batch import Batch
from recsys.data.item_frequency import NumberRange

logger = logging.getLogger(__name__)

HORIZON = 10
LARGEST = 8.0  # standard deviations; larger values are clamped


class InputScaling(nn.Module):
    """Standardises numbers of a batch: columns `dense` [F], and `lists` beside each history [P]."""

    mean: Tensor  # [W]
    deviation: Tensor  # [W]
    is_scaled: Tensor  # bool [W]
    fits: Tensor  # []

    def __init__(self, dense: Sequence[str], lists: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.dense, self.lists = list(dense), [list(names) for names in lists]
        self.names = [*self.dense, *(name for names in self.lists for name in names)]
        self.register_buffer("mean", torch.zeros(len(self.names)))
        self.register_buffer("deviation", torch.ones(len(self.names)))
        self.register_buffer("is_scaled", torch.zeros(len(self.names), dtype=torch.bool))
        self.register_buffer("fits", torch.zeros(()))

    def of_dense(self, dense: Sequence[str]) -> InputScaling:
        selected = InputScaling([name for name in dense if name in self.dense], self.lists)
        places = [self.names.index(name) for name in selected.names]
        for buffer, source in zip(selected.buffers(), self.buffers(), strict=True):
            buffer.copy_(source[places] if source.dim() else source)
        return selected

    @torch.no_grad()
    def fit(self, numbers: Mapping[str, NumberRange]) -> None:
        """Set or move mean and deviation to those of training rows; a scaled column stays so."""
        self.fits += 1
        for place, name in enumerate(self.names):
            rows, was_scaled = numbers[name], bool(self.is_scaled[place])
            if not rows.count or not (rows.is_wide or was_scaled):
                continue
            share = 1 / min(float(self.fits), HORIZON) if was_scaled else 1.0
            mean, variance = float(self.mean[place]), float(self.deviation[place]) ** 2
            apart = rows.mean - mean
            variance += share * (rows.variance - variance + (1 - share) * apart**2)
            self.mean[place] = mean + share * apart
            self.deviation[place] = math.sqrt(variance) or 1.0
            self.is_scaled[place] = True
            logger.info("standardized: '%s', %s in the training rows", name, rows)

    def forward(self, batch: Batch) -> Batch:
        """Return the batch with standardised numbers; `recorded_values` stay as they are."""
        dense, values, *further = self._parts(batch)
        history = replace(
            batch.history,
            values=values,
            unscaled_values=batch.history.values,
            further=[
                replace(events, values=values)
                for events, values in zip(batch.history.further, further, strict=True)
            ],
        )
        return replace(batch, dense_features=dense, history=history)

    def _parts(self, batch: Batch) -> list[Tensor]:
        """Return the dense features [B, F] and the lists beside each history [N, P]."""
        first = 0
        scaled = []
        lists = [batch.history.values, *(events.values for events in batch.history.further)]
        names = [self.dense, *(self.lists or [[]])]
        for numbers, columns in zip([batch.dense_features, *lists], names, strict=True):
            places = slice(first, first + len(columns))
            scaled.append(self._scaled(numbers, places) if columns else numbers)
            first += len(columns)
        return scaled

    def _scaled(self, numbers: Tensor, places: slice) -> Tensor:
        standard = (numbers - self.mean[places]) / self.deviation[places]
        standard = standard.clamp(-LARGEST, LARGEST)
        return torch.where(self.is_scaled[places], standard, numbers)
