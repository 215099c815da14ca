"""Losses of labels that are numbers, and what logits stand for, against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recsys.config import AuxiliarySettings
from recsys.data.schema import Schema
from recsys.data.schema_columns import Column
from recsys.model.auxiliary import build_auxiliary
from recsys.model.losses import RankingLoss, predictions

LOSSES = ("bce", "mse", "huber", "poisson")


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


def test_a_number_is_no_label_of_a_distillation() -> None:
    columns = {
        "item": Column("id", num_embeddings=3),
        "liked": Column("label"),
        "stars": Column("label", loss="mse"),
        "teacher": Column("extra"),
    }
    for label in (0, 1):
        options = {"column": "teacher", "label": label}
        settings = {"teacher": AuxiliarySettings("distillation", options=options)}
        if label == 0:
            assert build_auxiliary(settings, Schema("item", "item", columns)) is not None
            continue
        with pytest.raises(ValueError, match=r"auxiliary\.teacher\.options\.label.*mse"):
            build_auxiliary(settings, Schema("item", "item", columns))
