"""Statistics of batch normalisation on two ranks."""

import pytest
import torch
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from recsys.distributed.pipeline import DenseUpdate
from recsys.optimizer.running_statistics import RunningStatistics
from tests.ranks import run_on_ranks


def statistics_after_an_update(rank: int, world_size: int) -> tuple[float, float, float]:
    """Mean and variance of a trained layer, and mean of a frozen one of this rank's own."""
    model = nn.ModuleList([nn.BatchNorm1d(1, momentum=0.5), nn.BatchNorm1d(1).eval()])
    trained, frozen = model
    frozen.running_mean.fill_(rank)  # type: ignore[operator, union-attr]
    trained(torch.tensor([[0.0], [8.0 * (rank + 1)]])).sum().backward()
    sgd = torch.optim.SGD(trained.parameters(), lr=1.0)
    keyed = KeyedOptimizerWrapper(dict(trained.named_parameters()), lambda _: sgd)
    DenseUpdate(CombinedOptimizer([keyed]), sgd, statistics=RunningStatistics(model)).step()
    values = trained.running_mean, trained.running_var, frozen.running_mean
    mean, variance, plain_mean = (float(value) for value in values)  # type: ignore[arg-type]
    return mean, variance, plain_mean


def test_after_an_update_all_ranks_have_the_mean_of_their_statistics() -> None:
    first, second = run_on_ranks(statistics_after_an_update, 2)
    # Batches (0, 8) and (0, 16) have the means 4 and 8, and the variances 32 and 128.
    expected = (0.5 * 0 + 0.5 * (4 + 8) / 2, 0.5 * 1 + 0.5 * (32 + 128) / 2)
    assert first[:2] == second[:2] == pytest.approx(expected)
    assert (first[2], second[2]) == (0, 1)
