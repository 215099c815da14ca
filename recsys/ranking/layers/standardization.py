"""Standardises numbers of any scale to mean 0 and variance 1 over the rows seen in training.

Content cosines differ by about a tenth, the share of liked items by one, logarithms of lengths by
ten. An MLP that reads them side by side learns late from numbers that vary little.

Batch normalization (Ioffe & Szegedy 2015, arXiv 1502.03167) would make a row's logit depend on the
other rows of its batch, in training. Here the statistics cover all steps so far and all ranks, so
that one batch hardly moves them, and they pass on no gradient. With `accumulate_steps` each batch
of a group updates them.

Shapes: B batch, W numbers.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS = 1000  # horizon of the running mean; older steps count less and less
LARGEST = 8.0  # standard deviations; larger values are clamped
LEAST_VARIANCE = 1e-4  # keeps nearly constant numbers from being scaled up


class Standardization(nn.Module):
    """(x - mean) / standard deviation, both running over the steps of training. A collective.

    Padding rows do not count. The first steps have equal weight, as in a plain mean.

    Args:
        num_numbers: W.
        process_group: the ranks whose rows count; None for this rank alone.
    """

    mean: Tensor
    variance: Tensor
    steps: Tensor

    def __init__(self, num_numbers: int, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.process_group = process_group
        self.register_buffer("mean", torch.zeros(num_numbers))
        self.register_buffer("variance", torch.ones(num_numbers))
        self.register_buffer("steps", torch.zeros(()))

    def forward(
        self,
        numbers: Tensor,  # [B, W]
        row_weights: Tensor | None = None,  # [B], 0 for a padding row
    ) -> Tensor:  # [B, W]
        """Update the statistics in training, and return the standardised numbers. A collective."""
        if self.training:
            self._update(numbers.detach(), row_weights)
        scale = (self.variance + LEAST_VARIANCE).rsqrt()
        return ((numbers - self.mean) * scale).clamp(-LARGEST, LARGEST)

    @torch.no_grad()
    def _update(self, numbers: Tensor, row_weights: Tensor | None) -> None:  # [B, W], [B]
        """Add the rows of a step, of all ranks, to the statistics. A collective."""
        weights = numbers.new_ones(len(numbers)) if row_weights is None else row_weights
        # In double precision: squares of numbers far from 0 cancel.
        apart = numbers.double() - self.mean
        of_rows = torch.cat([torch.ones_like(apart[:, :1]), apart, apart.square()], dim=1)
        totals = weights.double() @ of_rows  # [1 + 2 W]
        if self.process_group is not None:
            dist.all_reduce(totals, group=self.process_group)
        shift, square = (totals[1:] / totals[0].clamp(min=1)).chunk(2)
        has_rows = totals[0] > 0
        self.steps += has_rows
        share = has_rows / self.steps.double().clamp(1, STEPS)
        self.mean += share * shift
        around_new_mean = square - share * shift.square()
        self.variance += share * (around_new_mean - self.variance)
