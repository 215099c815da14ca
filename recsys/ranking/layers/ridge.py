"""Ridge regression on the vectors of a history, one for each row, with the gradient in closed form.

Shapes: R histories, L longest history, Z width of a vector, K targets of each history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class RidgePredictions:
    """Mean and variance of w . target, given residuals = w . past + noise, w ~ N(0, diag(prior)).

    The mean is k (K + diag(1 / precisions))^-1 residuals, with K = past diag(prior) past' and k the
    same of target and past (Rasmussen and Williams 2006, equation 2.11).

    past: [R, L, Z]
    residuals: [R, L]
    precisions: [R, L], 1 / variance of the noise; 0 where a place holds no item.
    target: [R, Z, K]
    prior: [Z]
    """

    past: Tensor
    residuals: Tensor
    precisions: Tensor
    target: Tensor
    prior: Tensor

    def exact(self) -> tuple[Tensor, Tensor]:  # [R * K], [R * K]
        """Compute in double precision: packages and predictions agree to 1e-6."""
        parts = self.past, self.residuals, self.precisions, self.target, self.prior
        weights, directions = _solve(*(part.double() for part in parts))
        mean, variance = (weights * self.target).sum(1), (directions * self.target).sum(1)
        return mean.flatten().float(), variance.flatten().float()

    def fast(self) -> tuple[Tensor, Tensor]:  # [R], [R]
        """Compute in float32, of one target each; the gradient costs O(L Z), not O(L Z ** 2)."""
        parts = self.past, self.residuals, self.precisions, self.target, self.prior
        return _Ridge.apply(*parts)


def _solve(
    past: Tensor, residuals: Tensor, precisions: Tensor, target: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the means of w [R, Z, 1], and the covariance of w times the targets [R, Z, K]."""
    weighted = (past * precisions.unsqueeze(2)).transpose(1, 2)  # [R, Z, L]
    factor = torch.linalg.cholesky(weighted @ past + torch.diag(1 / prior))  # [R, Z, Z]
    products = weighted @ residuals.unsqueeze(2)
    return torch.cholesky_solve(products, factor), torch.cholesky_solve(target, factor)


class _Ridge(torch.autograd.Function):
    """Autograd of `RidgePredictions.fast`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        weights, directions = _solve(*inputs)
        ctx.save_for_backward(*inputs, weights, directions)
        mean, variance = ((part * inputs[3]).sum(1) for part in (weights, directions))
        return mean.flatten(), variance.flatten()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # [R], [R]
        past, residuals, precisions, _, prior, weights, directions = ctx.saved_tensors
        mean, variance = (part.unsqueeze(1) for part in gradients)
        along, predicted = (past @ torch.cat([directions, weights], dim=2)).unbind(2)  # [R, L]
        errors = residuals - predicted
        factors = precisions * (mean * errors - 2 * variance * along), precisions * mean * along
        rows = torch.cat([directions, -weights], dim=2).transpose(1, 2)  # [R, 2, Z]
        weights, directions = weights.squeeze(2), directions.squeeze(2)
        scaled = mean * weights + variance * directions  # [R, Z]
        return (
            torch.stack(factors, dim=2) @ rows if ctx.needs_input_grad[0] else None,
            precisions * mean * along,
            along * (mean * errors - variance * along),
            (scaled + variance * directions).unsqueeze(2),
            (scaled * directions).sum(0) / prior.square(),
        )
