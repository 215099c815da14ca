"""Auxiliary losses: what is added to the losses of ranking and contrast, each with its weight.

A loss of the user's own is an `nn.Module` in one file and a line of YAML. It is made with its
`options`, and called with `AuxiliaryInputs` in training; it returns the loss [] of the batch. What
it needs of the rows beside labels it lists as `columns`, columns of kind `extra` in schema.yaml:

    class Calm(nn.Module):  # keeps logits small
        columns = ()

        def __init__(self, power: int) -> None: ...
        def forward(self, inputs: AuxiliaryInputs) -> Tensor: ...

    auxiliary: {calm: {loss: "my_losses:Calm", weight: 0.1, options: {power: 2}}}

Shapes: B batch, C labels, X extra columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config import AuxiliarySettings
from recsys.config.named_parts import make_part
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.data.schema import Schema
from recsys.ranking.vectors import IDVectors

LOSSES = {"distillation": "recsys.model.auxiliary:Distillation"}
# Names that the parts of the loss have already.
TAKEN = ("loss", "ranking", "contrastive", "query", "item")


@dataclass
class AuxiliaryInputs:
    """What an auxiliary loss may read of a batch.

    logits: [B, C], of the ranking model.
    ids, content: the vectors that were ranked; `content.read_history` is a collective.
    batch: with `labels` [B, C], `row_weights` [B] (0 for a row that pads) and all else.
    columns: [B] of each extra column that the loss has asked for, NaN where a row has no value.
    """

    logits: Tensor
    ids: IDVectors
    content: ContentVectors | None
    batch: Batch
    columns: dict[str, Tensor] = field(default_factory=dict)


class AuxiliaryLosses(nn.Module):
    """The weighted sum of auxiliary losses.

    Args:
        losses: by the user's name.
        weights: of each.
        extra: the extra columns of the schema, in its order.
    """

    def __init__(
        self, losses: Mapping[str, nn.Module], weights: Mapping[str, float], extra: list[str]
    ) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(losses)
        self.weights, self.extra = dict(weights), extra

    def forward(self, inputs: AuxiliaryInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum [], and each loss [] without its weight."""
        parts = {}
        for name, loss in self.losses.items():
            inputs.columns = {
                column: cast(Tensor, inputs.batch.extra)[:, self.extra.index(column)]
                for column in _columns_of(loss)
            }
            parts[name] = loss(inputs)
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return total, parts


class Distillation(nn.Module):
    """Pulls the logits towards those of a teacher, which are a column of the rows.

    The teacher's probability sigmoid(t / T) is the soft target of sigmoid(z / T); the loss is
    multiplied by T squared, so that its gradient does not shrink with T (Hinton et al. 2015,
    arXiv 1503.02531). A row without a teacher's logit counts 0, and stays in the mean's divisor, so
    that every impression has the same weight whatever rows it shares a batch with.

    Args:
        column: the teacher's logits, of kind `extra`.
        loss: `bce`, the cross-entropy; `kl`, the divergence from the teacher, which has the same
            gradient and is 0 where both agree.
        temperature: T.
        label: place of the label that the teacher predicts.

    Raises:
        ValueError: an unknown loss, or a temperature that is not above 0.

    Example::

        from recsys.model.auxiliary import Distillation

        loss = Distillation(column="teacher", loss="kl", temperature=2.0)
        assert loss.columns == ("teacher",)
    """

    def __init__(
        self,
        column: str,
        loss: Literal["bce", "kl"] = "bce",
        temperature: float = 1.0,
        label: int = 0,
    ) -> None:
        super().__init__()
        if loss not in ("bce", "kl"):
            raise ValueError(f"options.loss of a distillation is '{loss}'; choose bce or kl")
        if not 0 < temperature < float("inf"):
            raise ValueError(
                f"options.temperature of a distillation is {temperature}; it must be > 0 and finite"
            )
        self.columns = (column,)
        self.loss, self.temperature, self.label = loss, temperature, label

    def forward(self, inputs: AuxiliaryInputs) -> Tensor:  # []
        teacher = inputs.columns[self.columns[0]]  # [B]
        is_known = ~teacher.isnan()
        teacher = teacher.nan_to_num(0.0) / self.temperature
        student = inputs.logits[:, self.label] / self.temperature
        target = teacher.sigmoid()
        losses = F.binary_cross_entropy_with_logits(student, target, reduction="none")
        if self.loss == "kl":
            losses = losses - F.binary_cross_entropy_with_logits(teacher, target, reduction="none")
        counts = is_known * inputs.batch.row_weights
        return (losses * counts).mean() * self.temperature**2


def _columns_of(loss: nn.Module) -> tuple[str, ...]:
    return tuple(getattr(loss, "columns", ()))


def build_auxiliary(
    settings: Mapping[str, AuxiliarySettings], schema: Schema
) -> AuxiliaryLosses | None:
    """Returns the losses that `auxiliary` names; None where it names none.

    Raises:
        ValueError: a loss cannot be made, has a name that is taken, or asks for a column that is
            not of kind extra.
    """
    extra, losses = schema.of_kind("extra"), {}
    for name, own in settings.items():
        where = f"auxiliary.{name}"
        if name in TAKEN or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"{where}: a loss cannot have this name; choose another")
        loss = make_part(f"{where}.loss", own.loss, LOSSES, nn.Module, **own.options)
        if unknown := sorted(set(_columns_of(loss)) - set(extra)):
            raise ValueError(
                f"{where}: column '{unknown[0]}' is not of kind extra in schema.yaml, which has "
                f"{extra}; add it there"
            )
        losses[name] = loss
    weights = {name: own.weight for name, own in settings.items()}
    return AuxiliaryLosses(losses, weights, extra) if losses else None
