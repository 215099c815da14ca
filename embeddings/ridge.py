r"""Ridge regression over all ranks' rows, its penalty chosen by leave-one-out (PRESS).

W minimises sum ||y - x W||^2 + penalty ||W||^2; the error of a pair left out is e / (1 - h)
(Golub, Heath and Wahba 1979). Shapes: N pairs of this rank, n of all, E and D widths, P penalties.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK_ROWS = 2**16
# Multiples of the mean eigenvalue of X'X, the simplest map first.
MULTIPLES = (float("inf"), *(10.0**power for power in range(4, -7, -1)))
TIE = 1e-9  # relative difference of errors that are equal to rounding, as those of two pairs are
NO_VARIANCE = 1e-12  # a variance below this share of the mean square is that of rounding


@dataclass(frozen=True)
class RidgeMap:
    """A linear map from vectors to rows, in float64.

    x_mean: [E], y_mean: [D], weights: [E, D]; num_pairs: n.
    penalty: infinite for the mean of the rows.
    error: mean squared error per number of a pair left out; that of the mean is `mean_error`.
    """

    x_mean: Tensor
    y_mean: Tensor
    weights: Tensor
    penalty: float
    num_pairs: int
    error: float
    mean_error: float

    def __call__(self, x: Tensor) -> Tensor:  # [N, E] -> [N, D]
        return (x.double() - self.x_mean) @ self.weights + self.y_mean


def fit_ridge(
    x: Tensor,  # [N, E]
    y: Tensor,  # [N, D]
    group: dist.ProcessGroup | None = None,
) -> RidgeMap | None:
    """Fit the map to the pairs of all ranks, in float64; None without any pair. A collective."""
    counts = _summed(torch.tensor(float(len(x)), dtype=torch.float64), group)
    num_pairs = int(counts)
    if not num_pairs:
        return None
    x_mean = _summed(x.double().sum(dim=0), group) / num_pairs
    y_mean = _summed(y.double().sum(dim=0), group) / num_pairs
    values, vectors, turned = _eigen(x, y, x_mean, y_mean, group)
    penalties = _penalties(values, x_mean, num_pairs)
    shrink = 1 / (values.unsqueeze(1) + penalties)  # [E, P]
    errors = torch.zeros(len(penalties), dtype=torch.float64)
    for a, b in _centred(x, y, x_mean, y_mean):
        errors += _left_out_errors(a @ vectors, b, turned, shrink, num_pairs)
    errors = _summed(errors, group) / (num_pairs * y.shape[1])
    best = int((errors <= errors.min() * (1 + TIE)).nonzero()[0])
    weights = vectors @ (shrink[:, best, None] * turned)
    if group is not None:
        dist.broadcast(weights, group_src=0, group=group)
    penalty, error, mean_error = (
        float(number) for number in (penalties[best], errors[best], errors[0])
    )
    return RidgeMap(x_mean, y_mean, weights, penalty, num_pairs, error, mean_error)


def _eigen(
    x: Tensor, y: Tensor, x_mean: Tensor, y_mean: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:  # [E], [E, E], [E, D]
    """Return eigenvalues and eigenvectors of X'X, and X'Y in their basis. A collective."""
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    moment = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for a, b in _centred(x, y, x_mean, y_mean):
        gram += a.T @ a
        moment += a.T @ b
    values, vectors = torch.linalg.eigh(_summed(gram, group))
    return values.clamp(min=0), vectors, vectors.T @ _summed(moment, group)


def _penalties(values: Tensor, x_mean: Tensor, num_pairs: int) -> Tensor:  # [E], [E] -> [P]
    scale = float(values.mean())
    is_constant = scale <= NO_VARIANCE * num_pairs * float(x_mean.square().mean())
    if is_constant or num_pairs < 3:
        return torch.full((1,), torch.inf, dtype=torch.float64)
    return torch.tensor(MULTIPLES, dtype=torch.float64) * scale


def _left_out_errors(
    x: Tensor,  # [N, E], in the basis of eigenvectors
    y: Tensor,  # [N, D]
    turned: Tensor,  # [E, D]
    shrink: Tensor,  # [E, P]
    num_pairs: int,
) -> Tensor:  # [P]
    """Return sums of squared errors of pairs left out, [P]."""
    leverage = x.square() @ shrink + 1 / num_pairs  # [N, P]
    factor = 1 / (1 - leverage).clamp(min=1e-9)
    errors = [
        ((y - x @ (factors.unsqueeze(1) * turned)) * factor[:, index, None]).square().sum()
        for index, factors in enumerate(shrink.T)
    ]
    return torch.stack(errors)


def _centred(
    x: Tensor, y: Tensor, x_mean: Tensor, y_mean: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(x), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        yield x[part].double() - x_mean, y[part].double() - y_mean


def _summed(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum over the ranks. A collective."""
    if group is not None:
        dist.all_reduce(value, group=group)
    return value
