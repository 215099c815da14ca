"""The losses against loops over the published formulas, on one rank and on uneven two."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recsys.config import ContrastiveSettings
from recsys.model.losses import ContentIDContrastive, RankingLoss
from tests.fake_gpu import fake_gpu, on_fake_gpu
from tests.ranks import run_on_ranks

CONTENT_DIM, ID_DIM, DIM = 4, 3, 5
ITEMS = torch.tensor([4, 9, 4, 2, 9, 4])
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
        others = [n for n in range(len(items)) if items[n] != items[row]]
        positive = z_i[row] @ z_c[row]
        c2i = cross_entropy_of_first(
            [s / tau for s in [positive, *(z_i[n] @ z_c[row] for n in others)]]
        )
        i2c = cross_entropy_of_first(
            [s / tau for s in [positive, *(z_c[n] @ z_i[row] for n in others)]]
        )
        losses.append((c2i + i2c) / 2)
    return losses


def gradients_of(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs))


def assert_same_gradients(one: Tensor, other: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for mine, wanted in zip(gradients_of(one, inputs), gradients_of(other, inputs), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-4)


def test_a_label_that_is_not_known_equals_one_of_weight_0() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, generator=generator, requires_grad=True)
    labels = torch.tensor([[1.0, 0.0], [0.0, math.nan], [1.0, math.nan], [math.nan, 1.0]])
    known = (~labels.isnan()).float()
    loss = RankingLoss([1.0, 0.5])
    expected = loss(logits, torch.where(known == 0, 1.0, labels), known)
    actual = loss(logits, labels, known)
    assert ((gradients_of(loss(logits, labels, known), [logits])[0] != 0) == (known == 1)).all()
    assert_same_gradients(actual, expected, [logits])


def test_weights_weigh_rows_and_a_row_of_weight_0_is_no_negative() -> None:
    loss, weights = contrastive(), torch.tensor([2.0, 1, 0, 3, 0, 0])
    content, ids = sides()
    used = weights.nonzero()[:, 0]
    rows = in_batch_rows(loss, content[used], ids[used], ITEMS[used], 0.1)
    expected = (torch.stack(rows) * weights[used]).sum() / weights.sum()
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


def test_published_draws_so_many_rows_of_the_batch_uniformly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Tensor] = []
    original = torch.randint

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        drawn.append(original(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, "randint", recording)
    contrastive(variant="published", num_negatives=500)(*sides(), ITEMS)
    (negatives,) = drawn  # one draw serves both directions
    assert negatives.shape == (len(ITEMS), 500)
    counts = torch.bincount(negatives.flatten(), minlength=len(ITEMS))
    assert counts.min() > 400 and counts.max() < 600


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
    assert all(torch.isfinite(part).all() for part in gradients_of(loss, [content, ids]))


@pytest.mark.parametrize("variant", ["in_batch", "published"])
@pytest.mark.parametrize(
    ("stopped", "reaches"), [("none", [1, 1]), ("content", [0, 1]), ("id", [1, 0])]
)
def test_a_stopped_side_gets_no_gradient_and_the_loss_stays(
    variant: str, stopped: str, reaches: list[int]
) -> None:
    content, ids = sides()
    loss = contrastive(variant=variant, stop_gradient=stopped)
    without_stop = contrastive(variant=variant)
    torch.manual_seed(5)
    value = loss(content, ids, ITEMS)
    torch.manual_seed(5)
    assert torch.equal(value, without_stop(content, ids, ITEMS))
    value.backward()
    assert [
        int(side.grad is not None and bool(side.grad.any())) for side in (content, ids)
    ] == reaches
    for parameter in loss.parameters():
        assert parameter.grad is not None and parameter.grad.any()


def test_a_learned_temperature_starts_as_set_and_trains_by_the_loss() -> None:
    loss = contrastive(temperature=0.5, learn_temperature=True)
    content, ids = sides()
    value = loss(content, ids, ITEMS)
    assert torch.equal(value, contrastive(temperature=0.5)(content, ids, ITEMS))
    log_temperature = torch.tensor(math.log(0.5), requires_grad=True)
    expected = torch.stack(in_batch_rows(loss, content, ids, ITEMS, log_temperature.exp())).mean()
    value.backward()
    expected.backward()
    assert isinstance(loss.log_temperature, nn.Parameter)
    torch.testing.assert_close(
        loss.log_temperature.grad, log_temperature.grad, atol=1e-5, rtol=1e-4
    )
    torch.optim.SGD(loss.parameters(), lr=0.1).step()
    assert loss(content, ids, ITEMS) < value


def test_a_fixed_temperature_is_no_parameter_and_in_no_checkpoint() -> None:
    loss = contrastive()
    assert {name for name, _ in loss.named_parameters()} == set(loss.state_dict())
    assert not any("temperature" in name for name in loss.state_dict())


def loss_on_rank(rank: int, world_size: int) -> dict[str, Any]:
    content, ids = sides()
    first = sum(RANK_SIZES[:rank])
    rows = slice(first, first + RANK_SIZES[rank])
    loss = contrastive(temperature=0.5, all_ranks=True)
    value = loss(content[rows], ids[rows], ITEMS[rows])
    value.backward()
    assert content.grad is not None and ids.grad is not None
    gradients = {name: part.grad for name, part in loss.named_parameters()}
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


def test_ranking_loss_is_the_weighted_sum_of_each_labels_mean_cross_entropy() -> None:
    logits = torch.tensor([[0.3, -1.2], [2.0, 0.7], [-0.5, 0.0]], requires_grad=True)
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    weights = [1.0, 0.25]
    value = RankingLoss(weights)(logits, labels)
    expected, slopes = 0.0, torch.zeros(3, 2)
    for row in range(3):
        for label in range(2):
            p = 1 / (1 + math.exp(-logits[row, label].item()))
            y = labels[row, label].item()
            expected -= weights[label] * (y * math.log(p) + (1 - y) * math.log(1 - p)) / 3
            slopes[row, label] = weights[label] * (p - y) / 3
    value.backward()
    assert value.item() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(logits.grad, slopes, atol=1e-5, rtol=1e-5)


def test_a_row_that_pads_has_no_ranking_loss_and_stays_in_the_divisor() -> None:
    logits, labels = torch.tensor([[0.3], [2.0], [5.0]]), torch.tensor([[1.0], [0.0], [0.0]])
    loss = RankingLoss([1.0])
    padded = loss(logits, labels, torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(padded, loss(logits[:2], labels[:2]) * 2 / 3)


def test_a_row_that_pads_is_neither_positive_nor_negative_of_the_contrastive_loss() -> None:
    content, ids = sides()
    loss = contrastive()
    weights = torch.ones(len(ITEMS))
    weights[-1] = 0.0
    padded = loss(content, ids, ITEMS, weights)
    without = loss(content[:-1], ids[:-1], ITEMS[:-1])
    torch.testing.assert_close(padded, without * (len(ITEMS) - 1) / len(ITEMS))
    for gradient in gradients_of(padded, [content, ids]):
        assert not gradient[-1].any()


@pytest.mark.parametrize("variant", ["in_batch", "published"])
def test_a_batch_on_a_gpu_is_compared_on_that_gpu(variant: str) -> None:
    loss, given = contrastive(variant=variant), [*sides(), ITEMS]
    with fake_gpu():
        value = on_fake_gpu(loss)(*on_fake_gpu(given))
        assert value.device.type == "cuda"
