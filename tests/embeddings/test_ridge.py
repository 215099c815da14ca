"""The map from vectors to rows: its closed form, its penalty by leaving pairs out, its ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.ridge import MULTIPLES, RidgeMap, fit_ridge
from tests.ranks import run_on_ranks


def pairs(count: int, width: int = 6, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, width, generator=generator) + 3
    y = x @ torch.randn(width, 4, generator=generator)
    return x, y + noise * torch.randn(count, 4, generator=generator)


def fit(x: Tensor, y: Tensor) -> RidgeMap:
    result = fit_ridge(x, y)
    assert result is not None
    return result


def plain_rows(x: np.ndarray, y: np.ndarray, penalty: float, indices: np.ndarray) -> np.ndarray:
    """The rows of the vectors `of`, by the normal equations."""
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    if penalty == np.inf:
        return np.broadcast_to(y_mean, (len(indices), y.shape[1]))
    a = x - x_mean
    gram = a.T @ a + penalty * np.eye(x.shape[1])
    return (indices - x_mean) @ np.linalg.solve(gram, a.T @ (y - y_mean)) + y_mean


@pytest.mark.parametrize("count", [60, 7, 4, 2])  # 4 and 2 are fewer than the dimensions
def test_the_map_is_the_closed_form_with_the_penalty_of_the_least_left_out_error(
    count: int,
) -> None:
    x, y = pairs(count)
    result = fit(x, y)
    a, b = x.double().numpy(), y.double().numpy()
    eigenvalues = np.linalg.eigvalsh((a - a.mean(0)).T @ (a - a.mean(0)))
    penalties = [np.inf, *(multiple * eigenvalues.mean() for multiple in MULTIPLES[1:])]
    results = [np.arange(count) != index for index in range(count)]
    errors = [
        np.mean([(plain_rows(a[o], b[o], p, a[~o]) - b[~o]) ** 2 for o in results])
        for p in penalties
    ]
    assert result.penalty == pytest.approx(penalties[int(np.argmin(errors))])
    # A pair left out moves the means, so its error follows from the fit with it only in exact sums.
    assert result.error == pytest.approx(min(errors), rel=1e-6)
    assert result.mean_error == pytest.approx(errors[0])
    new = np.random.default_rng(0).normal(size=(5, 6))
    expected = plain_rows(a, b, result.penalty, new)
    np.testing.assert_allclose(result(torch.from_numpy(new)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "x",
    [torch.full((20, 6), 0.1), torch.zeros(20, 6), torch.full((1, 6), 2.0)],
    ids=["constant", "zero", "one pair"],
)
def test_vectors_that_tell_nothing_give_the_mean(x: Tensor) -> None:
    y = pairs(20)[1][: len(x)]
    result = fit(x, y)
    assert result.penalty == np.inf
    expected = y.double().mean(dim=0).expand(3, 4)
    torch.testing.assert_close(result(torch.randn(3, 6)), expected, rtol=1e-12, atol=1e-12)


def test_without_pairs_there_is_no_map() -> None:
    assert fit_ridge(torch.zeros(0, 6), torch.zeros(0, 4)) is None


def fit_on_rank(rank: int, world_size: int) -> tuple[float, Tensor]:
    x, y = pairs(61)
    share = slice(0, 50) if rank == 0 else slice(50, None)
    result = fit_ridge(x[share], y[share], dist.group.WORLD)
    assert result is not None
    return result.penalty, result(x[:9])


def test_ranks_with_unequal_shares_fit_the_same_map() -> None:
    x, y = pairs(61)
    expected = fit(x, y)
    first, second = run_on_ranks(fit_on_rank, 2)
    assert torch.equal(first[1], second[1])
    assert first[0] == pytest.approx(expected.penalty)
    torch.testing.assert_close(first[1], expected(x[:9]), rtol=1e-9, atol=1e-9)
