"""Numbers of any scale -> mean 0 and variance 1 over the rows that training has seen.

Cosines of content lie within a tenth of each other, the share of liked items within one, logarithms
of lengths within ten. Where an MLP reads them side by side, what varies little is learned late.

Batch normalization (Ioffe & Szegedy 2015, arXiv 1502.03167) would make a row's logit depend on the
rows beside it, in training. Here the statistics are those of all steps so far and of all ranks,
which one batch hardly moves, and pass on no gradient. With `accumulate_steps` each batch of a group
moves them.

Shapes: B batch, W numbers.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS = 1000  # the last so many count, older ones less and less
LARGEST = 8.0  # standard deviations: nothing is further off
LEAST_VARIANCE = 1e-4  # what hardly varies is not blown up


class Standardization(nn.Module):
    """(x - mean) / standard deviation, both running over the steps of training. A collective.

    Rows that pad do not count. The first steps weigh alike, as in a plain mean.

    Args:
        num_numbers: W.
        process_group: the ranks whose rows count; None for this one alone.

    Example::

        standardization = Standardization(1)
        standardization(torch.tensor([[3.0], [5.0]]))  # of mean 4 and variance 1: -1 and 1
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
        row_weights: Tensor | None = None,  # [B], 0 for a row that pads
    ) -> Tensor:  # [B, W]
        if self.training:
            self._update(numbers.detach(), row_weights)
        scale = (self.variance + LEAST_VARIANCE).rsqrt()
        return ((numbers - self.mean) * scale).clamp(-LARGEST, LARGEST)

    @torch.no_grad()
    def _update(self, numbers: Tensor, row_weights: Tensor | None) -> None:
        """Takes the rows of a step, of all ranks, into the statistics. A collective."""
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
