"""The losses against loops over the published formulas, on one rank and on uneven two."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys.config import ContrastiveSettings
from recsys.model.losses import ContentIDContrastive, RankingLoss, predictions
from tests.fake_gpu import fake_gpu, on_fake_gpu
from tests.ranks import run_on_ranks

CONTENT_DIM, ID_DIM, DIM = 4, 3, 5
ITEMS = torch.tensor([4, 9, 4, 2, 9, 4])
LOSSES = ("bce", "mse", "huber", "poisson")
RANK_SIZES = [4, 2]  # rows of ITEMS on each of two ranks


def sides(rows: int = len(ITEMS)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    content = torch.randn(rows, CONTENT_DIM, generator=generator)
    return content.requires_grad_(), torch.randn(rows, ID_DIM, generator=generator).requires_grad_()


def contrastive(**settings: Any) -> ContentIDContrastive:
    torch.manual_seed(0)
    return ContentIDContrastive(
        CONTENT_DIM, ID_DIM, ContrastiveSettings(weight=1.0, dim=DIM, **settings)
    )


def unit(vector: Tensor) -> Tensor:
    return vector / torch.clamp(torch.sqrt((vector**2).sum()), min=1e-5)


def mapped(loss: ContentIDContrastive, content: Tensor, ids: Tensor) -> tuple[Any, Any]:
    """z_c and z_i row by row, normalised where the settings say so."""
    normed = unit if loss.settings.normalize else (lambda vector: vector)
    return (
        [normed(loss.content_map.weight @ row + loss.content_map.bias) for row in content],
        [normed(loss.id_map.weight @ row + loss.id_map.bias) for row in ids],
    )


def cross_entropy_of_first(scores: list[Tensor]) -> Tensor:
    stacked = torch.stack(scores)
    return torch.log(torch.exp(stacked).sum()) - stacked[0]


def published_reference(
    loss: ContentIDContrastive, content: Tensor, ids: Tensor, negatives: Tensor, tau: float
) -> Tensor:
    z_c, z_i = mapped(loss, content, ids)
    total = torch.zeros(())
    for row in range(len(content)):
        drawn = negatives[row].tolist()
        positive = z_i[row] @ z_c[row]
        c2i = cross_entropy_of_first(
            [s / tau for s in [positive, *(z_i[n] @ z_c[row] for n in drawn)]]
        )
        i2c = cross_entropy_of_first(
            [s / tau for s in [positive, *(z_c[n] @ z_i[row] for n in drawn)]]
        )
        total = total + (c2i + i2c) / 2
    return total / len(content)


def in_batch_rows(
    loss: ContentIDContrastive, content: Tensor, ids: Tensor, items: Tensor, tau: Tensor | float
) -> list[Tensor]:
    """Each row's loss against all rows that are another item."""
    z_c, z_i = mapped(loss, content, ids)
    losses = []
    for row in range(len(items)):
        negatives = [n for n in range(len(items)) if items[n] != items[row]]
        positive = z_i[row] @ z_c[row]
        c2i = cross_entropy_of_first(
            [s / tau for s in [positive, *(z_i[n] @ z_c[row] for n in negatives)]]
        )
        i2c = cross_entropy_of_first(
            [s / tau for s in [positive, *(z_c[n] @ z_i[row] for n in negatives)]]
        )
        losses.append((c2i + i2c) / 2)
    return losses


def gradients_of(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs))


def assert_same_gradients(one: Tensor, other: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for actual, expected in zip(
        gradients_of(one, inputs), gradients_of(other, inputs), strict=True
    ):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_a_label_that_is_not_known_equals_one_of_weight_0() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, generator=generator, requires_grad=True)
    labels = torch.tensor([[1.0, 0.0], [0.0, math.nan], [1.0, math.nan], [math.nan, 1.0]])
    mask = (~labels.isnan()).float()
    loss = RankingLoss([1.0, 0.5])
    expected = loss(logits, torch.where(mask == 0, 1.0, labels), mask)
    actual = loss(logits, labels, mask)
    assert ((gradients_of(loss(logits, labels, mask), [logits])[0] != 0) == (mask == 1)).all()
    assert_same_gradients(actual, expected, [logits])


def test_weights_weigh_rows_and_a_row_of_weight_0_is_no_negative() -> None:
    loss, weights = contrastive(), torch.tensor([2.0, 1, 0, 3, 0, 0])
    content, ids = sides()
    counted = weights.nonzero()[:, 0]
    rows = in_batch_rows(loss, content[counted], ids[counted], ITEMS[counted], 0.1)
    expected = (torch.stack(rows) * weights[counted]).sum() / weights.sum()
    actual = loss(content, ids, ITEMS, weights / weights.mean())
    assert_same_gradients(actual, expected, [content, ids, *loss.parameters()])


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_published_equals_the_formula_in_loss_and_gradients_of_both_sides(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = contrastive(variant="published", temperature=temperature, num_negatives=3)
    # Given draws, with repetition and with a hit of the positive (row 1).
    negatives = torch.tensor([[1, 1, 2], [1, 0, 5], [0, 1, 3], [5, 5, 5], [0, 2, 4], [3, 2, 1]])
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: negatives)
    content, ids = sides()
    expected = published_reference(loss, content, ids, negatives, temperature)
    inputs = [content, ids, *loss.parameters()]
    assert_same_gradients(loss(content, ids, ITEMS), expected, inputs)
    for gradient in gradients_of(loss(content, ids, ITEMS), [content, ids]):
        assert gradient.abs().sum(dim=1).all()


def test_a_vector_of_almost_no_length_is_divided_by_1e_5() -> None:
    loss = contrastive(temperature=0.1)
    with torch.no_grad():
        loss.content_map.weight.zero_()
        loss.content_map.bias.copy_(torch.tensor([1e-7, 0, 0, 0, 0]))
    content, ids = sides(2)
    z_c = torch.tensor([1e-7 / 1e-5, 0, 0, 0, 0])
    z_i = [unit(loss.id_map.weight @ row + loss.id_map.bias) for row in ids]
    scores = [float((z_c @ row).detach()) / 0.1 for row in z_i]
    # Both content vectors are the same, so from ID to content each row's loss is log 2.
    c2i = [math.log(1 + math.exp(scores[1 - row] - scores[row])) for row in (0, 1)]
    expected = (sum(c2i) / 2 + math.log(2)) / 2
    assert loss(content, ids, ITEMS[:2]).item() == pytest.approx(expected, abs=1e-6)
    assert abs(expected - math.log(2)) > 1e-4  # else it would show nothing


@pytest.mark.parametrize("normalize", [True, False])
def test_in_batch_equals_a_loop_that_skips_rows_of_the_same_item(normalize: bool) -> None:
    loss = contrastive(temperature=0.5, normalize=normalize)
    content, ids = sides()
    expected = torch.stack(in_batch_rows(loss, content, ids, ITEMS, 0.5)).mean()
    assert_same_gradients(loss(content, ids, ITEMS), expected, [content, ids, *loss.parameters()])


def test_a_batch_of_one_item_has_no_negatives_and_no_loss() -> None:
    content, ids = sides(3)
    loss = contrastive()(content, ids, torch.tensor([7, 7, 7]))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert all(torch.isfinite(gradient).all() for gradient in gradients_of(loss, [content, ids]))


def loss_on_rank(rank: int, world_size: int) -> dict[str, Any]:
    content, ids = sides()
    first = sum(RANK_SIZES[:rank])
    rows = slice(first, first + RANK_SIZES[rank])
    loss = contrastive(temperature=0.5, all_ranks=True)
    value = loss(content[rows], ids[rows], ITEMS[rows])
    value.backward()
    assert content.grad is not None and ids.grad is not None
    gradients = {name: weight.grad for name, weight in loss.named_parameters()}
    return {"loss": value.item(), "inputs": [content.grad, ids.grad], "parameters": gradients}


def test_negatives_of_all_ranks_give_each_rank_its_rows_of_the_global_loss() -> None:
    content, ids = sides()
    loss = contrastive(temperature=0.5)
    rows = in_batch_rows(loss, content, ids, ITEMS, 0.5)
    ranks = run_on_ranks(loss_on_rank, 2)
    per_rank = [torch.stack(rows[:4]).mean(), torch.stack(rows[4:]).mean()]
    for result, expected in zip(ranks, per_rank, strict=True):
        assert result["loss"] == pytest.approx(expected.item(), abs=1e-5)
    # Summed over ranks, the gradients are those of the sum of the ranks' losses: what a rank
    # holds as negatives of the other's rows gets its gradient from there too.
    (per_rank[0] + per_rank[1]).backward()
    for index, side in enumerate((content, ids)):
        total = sum(result["inputs"][index] for result in ranks)
        torch.testing.assert_close(total, side.grad, atol=1e-5, rtol=1e-4)
    for name, parameter in loss.named_parameters():
        total = sum(result["parameters"][name] for result in ranks)
        torch.testing.assert_close(total, parameter.grad, atol=1e-5, rtol=1e-4)


def test_a_row_that_pads_has_no_ranking_loss_and_stays_in_the_divisor() -> None:
    logits, labels = torch.tensor([[0.3], [2.0], [5.0]]), torch.tensor([[1.0], [0.0], [0.0]])
    loss = RankingLoss([1.0])
    padded = loss(logits, labels, torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(padded, loss(logits[:2], labels[:2]) * 2 / 3)


@pytest.mark.parametrize("variant", ["in_batch", "published"])
def test_a_batch_on_a_gpu_is_compared_on_that_gpu(variant: str) -> None:
    loss, arguments = contrastive(variant=variant), [*sides(), ITEMS]
    with fake_gpu():
        value = on_fake_gpu(loss)(*on_fake_gpu(arguments))
        assert value.device.type == "cuda"


def columns() -> tuple[Tensor, Tensor]:
    """Logits and labels of each loss, [6, 4]."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, len(LOSSES), generator=generator)
    labels = 3 * torch.rand(6, len(LOSSES), generator=generator)
    labels[:, 0] = (labels[:, 0] > 1.5).float()
    labels[:, 3] = labels[:, 3].floor()
    return logits, labels


def by_formulas(logits: Tensor, labels: Tensor) -> Tensor:  # [4]
    """The mean loss of each label."""
    z, y = logits.T, labels.T
    probability, error = 1 / (1 + torch.exp(-z[0])), (z[2] - y[2]).abs()
    return torch.stack(
        [
            -(y[0] * probability.log() + (1 - y[0]) * (1 - probability).log()).mean(),
            ((z[1] - y[1]) ** 2).mean(),
            torch.where(error < 1, error**2 / 2, error - 0.5).mean(),
            (z[3].exp() - y[3] * z[3]).mean(),
        ]
    )


def test_each_label_has_its_own_loss() -> None:
    logits, labels = columns()
    weights = [1.0, 2.0, 0.5, 0.25]
    expected = (by_formulas(logits, labels) * torch.tensor(weights)).sum()
    torch.testing.assert_close(RankingLoss(weights, LOSSES)(logits, labels), expected)


def test_members_of_an_ensemble_have_the_mean_of_their_losses() -> None:
    logits, labels = columns()
    members, loss = torch.stack([logits, logits.flip(0)]), RankingLoss([1.0] * 4, LOSSES)
    expected = (loss(members[0], labels) + loss(members[1], labels)) / 2
    torch.testing.assert_close(loss(members, labels), expected)


@pytest.mark.parametrize("target", [0.3, 2.5])
def test_a_prediction_is_what_a_constant_label_would_be_learned_as(target: float) -> None:
    """At the prediction that equals the label, the gradient of every loss of numbers is zero."""
    logits = torch.tensor([[target, target, torch.tensor(target).log()]], requires_grad=True)
    losses = LOSSES[1:]
    labels = torch.full((1, 3), target)
    torch.testing.assert_close(predictions(logits, losses), labels)
    (gradient,) = torch.autograd.grad(RankingLoss([1.0] * 3, losses)(logits, labels), [logits])
    torch.testing.assert_close(gradient, torch.zeros(1, 3), atol=1e-6, rtol=0)
