"""Running statistics against those of all rows at once, on one rank and on several."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from recsys.config import ranking_settings
from recsys.model.build import build_ranking
from recsys.ranking.layers.fields import history_numbers
from recsys.ranking.layers.row_features import LARGEST, LEAST_VARIANCE, RowFeatures, Standardization
from tests.ranks import run_on_ranks
from tests.recsys.ranking.ranking_inputs import CONTENT, DIMENSIONS, LENGTHS, inputs

WIDTH, ROWS, STEPS = 3, 8, 4


def batches(rows: int = ROWS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale, offset = torch.tensor([0.01, 1.0, 50.0]), torch.tensor([0.8, -2.0, 1000.0])
    return [
        torch.randn(rows, WIDTH, generator=generator) * scale + offset + step
        for step in range(STEPS)
    ]


def trained(
    parts: list[Tensor],
    weights: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Standardization:
    standardization = Standardization(WIDTH, process_group)
    for part in parts:
        standardization(part, weights)
    return standardization


def assert_statistics(found: Standardization, rows: Tensor) -> None:
    torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.variance, rows.var(0, unbiased=False), rtol=1e-3, atol=1e-6)


def test_statistics_are_those_of_all_rows_so_far() -> None:
    assert_statistics(trained(batches()), torch.cat(batches()))


def test_numbers_have_mean_0_and_variance_1() -> None:
    (rows, *_) = batches(1000)
    standardized = Standardization(WIDTH)(rows)
    torch.testing.assert_close(standardized.mean(0), torch.zeros(WIDTH), atol=1e-3, rtol=0)
    variances = rows.var(0, unbiased=False)
    expected = variances / (variances + LEAST_VARIANCE)
    torch.testing.assert_close(standardized.var(0, unbiased=False), expected, rtol=1e-3, atol=0)


def test_evaluation_leaves_the_statistics_and_knows_no_other_rows() -> None:
    standardization = trained(batches()).eval()
    before = standardization.mean.clone()
    together = standardization(batches()[0])
    assert torch.equal(standardization.mean, before)
    for row, alone in zip(together, batches()[0]):
        assert torch.equal(standardization(alone.unsqueeze(0))[0], row)


def test_statistics_are_not_rounded_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        rounded = trained(batches())
    exact = trained(batches())
    assert torch.equal(rounded.mean, exact.mean) and torch.equal(rounded.variance, exact.variance)


def test_rows_that_pad_do_not_count() -> None:
    weights = torch.tensor([1.0] * 5 + [0.0] * 3)
    real = [rows[:5] for rows in batches()]
    assert_statistics(trained(batches(), weights), torch.cat(real))


@pytest.mark.parametrize("steps", [0, STEPS])
def test_a_step_of_padding_alone_changes_nothing(steps: int) -> None:
    standardization = trained(batches()[:steps])
    before = {name: value.clone() for name, value in standardization.state_dict().items()}
    standardization(torch.full((2, WIDTH), 9.0), torch.zeros(2))
    for name, value in standardization.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_hardly_varies_and_what_is_far_off_stays_small() -> None:
    standardization = Standardization(2)
    rows = torch.tensor([[1.0, 0.0]] * 99 + [[1.0 + 1e-4, 1e9]])
    standardized = standardization(rows)
    assert standardized[:, 0].abs().max() < 0.02
    assert standardized.abs().max() <= LARGEST


def test_gradients_pass_by_the_statistics() -> None:
    rows = batches()[1].requires_grad_()
    standardization = Standardization(WIDTH)
    standardization(rows).sum().backward()
    expected = (standardization.variance + LEAST_VARIANCE).rsqrt().expand_as(rows)
    torch.testing.assert_close(rows.grad, expected)


def statistics_on_rank(rank: int, world_size: int) -> dict[str, Any]:
    own = [rows[:3] if rank == 0 else rows[3:] for rows in batches()]
    standardization = trained(own, process_group=dist.group.WORLD)
    return {"mean": standardization.mean, "variance": standardization.variance}


def test_ranks_with_unlike_numbers_of_rows_have_the_statistics_of_all_rows() -> None:
    first, second = run_on_ranks(statistics_on_rank, 2)
    assert torch.equal(first["mean"], second["mean"])
    assert torch.equal(first["variance"], second["variance"])
    expected = trained(batches())
    torch.testing.assert_close(first["mean"], expected.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first["variance"], expected.variance, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["din_dcn", "din", "sim", "mmoe"])
@pytest.mark.parametrize("content", [CONTENT, None], ids=["content", "id_only"])
def test_ranking_models_standardise_numbers_and_leave_vectors(name: str, content: object) -> None:
    settings = ranking_settings(name, mlp_units=[6])
    plain, other = (
        build_ranking(replace(settings, standardize_numbers=on), DIMENSIONS, content).eval()  # type: ignore[arg-type]
        for on in (False, True)
    )
    assert isinstance(plain, RowFeatures) and isinstance(other, RowFeatures)
    assert plain.standardization is None and other.standardization is not None
    other.load_state_dict(plain.state_dict(), strict=False)
    statistics = other.standardization
    statistics.mean += 0.5
    statistics.variance += 3 - LEAST_VARIANCE  # a standard deviation of 2
    read = [_features(model, content is not None) for model in (plain, other)]
    is_number = ((read[0] - 0.5) / 2 - read[1]).abs().amax(0) < 1e-6
    assert int(is_number.sum()) == statistics.mean.numel()
    assert torch.equal(read[0][:, ~is_number], read[1][:, ~is_number])


def _features(model: RowFeatures, has_content: bool) -> Tensor:
    ids, content, batch = inputs()
    history, parallel = batch.jagged_history(), batch.history_values
    width = model.feature_dim
    interest = torch.ones(len(LENGTHS), ids.target.shape[1])
    numbers = history_numbers(history, parallel)
    found = model.features(
        ids, content if has_content else None, batch, interest, numbers, history, parallel
    )
    assert found.shape == (len(LENGTHS), width)
    return found
