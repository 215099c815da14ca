"""Computes logits of a target from its similarities to the history, not from its own ID vector.

A ridge regression on the vectors of each row's history has its gradient in closed form.
Shapes: R histories, L longest history, Z width of a vector, of which the first F numbers have no
gradient, K targets of each history; B batch, E numbers of evidence, S similarities,
V = NUM_VOTES, P parallel lists, W = len(LATEST), C labels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from embeddings.host import is_on_host
from recsys.ranking.layers.heads import hidden_layers
from recsys.ranking.layers.row_features import Standardization
from recsys.ranking.vectors import InputDimensions

EVIDENCE = ("regression", "variance", "item_mean", "item_count", "user_mean", "history_length")
MEANS = [EVIDENCE.index(name) for name in ("regression", "item_mean", "user_mean")]
# Lists have a mean over this many latest items. A mean over the latest 5 would follow the drift of
# a user's level and rank worse within users.
LATEST = (20, 200)
NUM_VOTES = 5  # numbers of one similarity

UNITS = [128, 64]
DROPOUT = 0.1


class EvidenceNetwork(nn.Module):
    """A linear map of the evidence, and an MLP on evidence, votes and means of lists beside it.

    The linear map begins with twice the sum of the evidence's three means, the MLP with 0. Each has
    a loss of its own: with one loss the MLP takes over, and the evidence learns less.
    """

    def __init__(self, num_similarities: int, dimensions: InputDimensions) -> None:
        super().__init__()
        width = len(EVIDENCE) + num_similarities * NUM_VOTES
        width += len(dimensions.parallel_names) * len(LATEST)
        self.standardization = Standardization(width, dimensions.process_group)
        self.linear = nn.Linear(len(EVIDENCE), dimensions.num_labels)
        layers, width = hidden_layers(width, UNITS, DROPOUT)
        last = nn.Linear(width, dimensions.num_labels)
        self.layers = nn.Sequential(*layers, last)
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.weight[:, MEANS] = 2.0
            for parameter in (self.linear.bias, last.weight, last.bias):
                parameter.zero_()

    def forward(
        self, evidence: Tensor, votes: Tensor, list_means: Tensor, row_weights: Tensor
    ) -> tuple[Tensor, Tensor]:  # [B, E], [B, S, V], [B, W * P], [B] -> [B, C], [B, C]
        """Return the linear map, and its sum with the MLP, with the gradient of the MLP alone.

        A collective in training: all ranks share the scales of the MLP's inputs.
        """
        numbers = torch.cat([evidence.detach(), votes.flatten(1), list_means], dim=1)
        linear = self.linear(evidence)
        return linear, linear.detach() + self.layers(self.standardization(numbers, row_weights))


@dataclass
class RidgePredictions:
    """Mean and variance of w . target, given residuals = w . event + noise, w ~ N(0, diag(prior)).

    The mean is k (K + diag(1 / precisions))^-1 residuals, with K = E diag(prior) E' and k the
    same of target and E, the events (Rasmussen and Williams 2006, equation 2.11).
    """

    fixed: Tensor  # [R, L, F], the first part of the vectors of the history
    events: Tensor  # [R, L, Z - F], the second part
    residuals: Tensor  # [R, L]
    precisions: Tensor  # [R, L], 1 / variance of the noise; 0 where a position holds no item
    target: Tensor  # [R, Z, K]
    prior: Tensor  # [Z]

    def exact(self) -> tuple[Tensor, Tensor]:  # [R * K], [R * K]
        """Compute in double precision: packages and predictions agree to 1e-6."""
        events = torch.cat([self.fixed, self.events], dim=2)
        inputs = events, self.residuals, self.precisions, self.target, self.prior
        weights, directions = _solve(*(tensor.double() for tensor in inputs))
        mean, variance = (weights * self.target).sum(1), (directions * self.target).sum(1)
        return mean.flatten().float(), variance.flatten().float()

    def fast(self) -> tuple[Tensor, Tensor]:  # [R], [R]
        """Compute in float32, of one target each; the gradient costs O(L Z), not O(L Z ** 2)."""
        return _Ridge.apply(
            self.fixed, self.events, self.residuals, self.precisions, self.target, self.prior
        )


def _solve(
    events: Tensor, residuals: Tensor, precisions: Tensor, target: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the means of w [R, Z, 1], and the covariance of w times the targets [R, Z, K]."""
    weighted = (events * precisions.unsqueeze(2)).transpose(1, 2)  # [R, Z, L]
    factor = _factor(torch.baddbmm(torch.diag(1 / prior), weighted, events))
    products = weighted @ residuals.unsqueeze(2)
    solved = torch.cholesky_solve(torch.cat([products, target], dim=2), factor)
    return solved[:, :, :1], solved[:, :, 1:]


def _solve_by_items(
    events: Tensor, residuals: Tensor, precisions: Tensor, target: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the results of `_solve`, from matrices [L, L] in place of [Z, Z]."""
    scale = precisions.sqrt().unsqueeze(2)
    scaled = events * scale
    weighted = scaled * prior
    ones = torch.eye(events.shape[1], dtype=events.dtype, device=events.device)
    factor = _factor(torch.baddbmm(ones, weighted, scaled.mT))
    products = torch.cat([scale * residuals.unsqueeze(2), weighted @ target], dim=2)
    solved = weighted.mT @ torch.cholesky_solve(products, factor)  # [R, Z, 1 + K]
    return solved[:, :, :1], prior.unsqueeze(1) * target - solved[:, :, 1:]


def _factor(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor. On a GPU its check would make the host wait."""
    return torch.linalg.cholesky_ex(matrix, check_errors=is_on_host(matrix)).L


class _Ridge(torch.autograd.Function):
    """Autograd of `RidgePredictions.fast`."""

    @staticmethod
    def forward(ctx: Any, fixed: Tensor, trained: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        events = torch.cat([fixed, trained], dim=2)
        solve = _solve_by_items if events.shape[1] < events.shape[2] else _solve
        weights, directions = solve(events, *inputs)
        ctx.num_fixed = fixed.shape[2]
        ctx.save_for_backward(events, *inputs, weights, directions)
        mean, variance = ((vectors * inputs[2]).sum(1) for vectors in (weights, directions))
        return mean.flatten(), variance.flatten()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # [R], [R]
        events, residuals, precisions, _, prior, weights, directions = ctx.saved_tensors
        mean, variance = (gradient.unsqueeze(1) for gradient in gradients)
        cov, predicted = (events @ torch.cat([directions, weights], dim=2)).unbind(2)  # [R, L]
        errors = residuals - predicted
        factors = precisions * (mean * errors - 2 * variance * cov), precisions * mean * cov
        rows = torch.cat([directions, -weights], dim=2)[:, ctx.num_fixed :].transpose(1, 2)
        weights, directions = weights.squeeze(2), directions.squeeze(2)
        scaled = mean * weights + variance * directions  # [R, Z]
        return (
            None,
            torch.stack(factors, dim=2) @ rows if ctx.needs_input_grad[1] else None,
            precisions * mean * cov,
            cov * (mean * errors - variance * cov),
            (scaled + variance * directions).unsqueeze(2),
            (scaled * directions).sum(0) / prior.square(),
        )
