"""Ridge predictions: the kernel's formula, and the closed gradient beside that of autograd."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from recsys.ranking.layers.evidence import RidgePredictions


def random_ridge(seed: int = 0, num_targets: int = 1, num_fixed: int = 1) -> RidgePredictions:
    """Three histories of at most five items, the second with two; vectors of width 3 + fixed."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    precisions = values(3, 5).exp()
    precisions[1, 2:] = 0
    width = num_fixed + 3
    vectors, residuals = (values(3, 5, num_fixed), values(3, 5, 3)), values(3, 5)
    tensors = *vectors, residuals, precisions, values(3, width, num_targets), values(width).exp()
    return RidgePredictions(*(tensor.requires_grad_() for tensor in tensors))


def by_kernel(ridge: RidgePredictions, row: int, target: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and variance by Gaussian process regression over the items of a history."""
    has_item = ridge.precisions[row] > 0
    events = torch.cat([ridge.fixed, ridge.events], dim=2)[row][has_item]
    residuals = ridge.residuals[row][has_item]
    noise = torch.diag(1 / ridge.precisions[row][has_item])
    vector = ridge.target[row, :, target]
    kernel, similarity = events * ridge.prior @ events.T, events * ridge.prior @ vector
    solved = torch.linalg.solve(kernel + noise, torch.stack([residuals, similarity], dim=1))
    variance = vector * ridge.prior @ vector - similarity @ solved[:, 1]
    return similarity @ solved[:, 0], variance


def test_predictions_are_those_of_kernel_regression() -> None:
    ridge = random_ridge(num_targets=2)
    means, variances = (values.view(3, 2) for values in ridge.exact())
    for row in range(3):
        for target in range(2):
            mean, variance = by_kernel(ridge, row, target)
            torch.testing.assert_close(means[row, target], mean.float())
            torch.testing.assert_close(variances[row, target], variance.float())


def test_an_item_twice_in_a_history_counts_less_than_twice() -> None:
    """Weighted means count equal items twice; the regression knows that they say the same."""
    events = torch.tensor([[[1.0], [1.0]]])
    once = torch.tensor([[1.0, 0.0]])
    statistics = torch.ones(1, 2), torch.ones(1, 1, 1), torch.ones(1)
    ridge = RidgePredictions(events[:, :, :0], events, statistics[0], once, *statistics[1:])
    assert float(ridge.exact()[0]) == 0.5  # 1 / (1 + noise 1)
    twice = replace(ridge, precisions=torch.ones(1, 2))
    torch.testing.assert_close(twice.exact()[0], torch.tensor([2 / 3]))


@pytest.mark.parametrize("num_fixed", [1, 4], ids=["long histories", "wide vectors"])
def test_the_closed_gradient_is_that_of_autograd(num_fixed: int) -> None:
    ridge = random_ridge(1, num_fixed=num_fixed)
    inputs = list(vars(ridge).values())[1:]

    def loss(mean: Tensor, variance: Tensor) -> Tensor:
        return (mean.sin() + variance.square() * torch.arange(3)).sum()

    reference = [by_kernel(ridge, row) for row in range(3)]
    expected = torch.autograd.grad(
        loss(*(torch.stack(gradients) for gradients in zip(*reference))), inputs, allow_unused=True
    )
    actual = torch.autograd.grad(loss(*ridge.fast()), inputs)
    counted = (ridge.precisions > 0).double()
    masks = [counted.unsqueeze(2), counted, counted, 1.0, 1.0]
    for mine, reference_gradient, mask in zip(actual, expected, masks):
        assert reference_gradient is not None
        torch.testing.assert_close(mine * mask, reference_gradient)


def test_an_empty_history_predicts_the_prior() -> None:
    ridge = random_ridge()
    empty = replace(ridge, precisions=torch.zeros_like(ridge.precisions))
    mean, variance = empty.exact()
    assert not mean.any()
    expected = (ridge.target.squeeze(2).square() * ridge.prior).sum(1).float()
    torch.testing.assert_close(variance, expected)
