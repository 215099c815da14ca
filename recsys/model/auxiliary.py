"""Auxiliary losses, added to the ranking and contrastive losses, each with its weight.

A user's loss is an `nn.Module`: `auxiliary: {calm: {loss: "my_losses:Calm", weight:
0.1}}`. Its attribute `columns` lists the extra columns that it reads. Shapes: B batch, C labels.
"""

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
# Names in use for other parts of the loss.
RESERVED_NAMES = ("loss", "ranking", "contrastive", "query", "item")


@dataclass
class AuxiliaryInputs:
    """Inputs of an auxiliary loss.

    The batch has `labels` [B, C] (NaN: not known), `rows.loss_weights` [B] (0: padding) and
    `rows.label_loss_weights` [B, C] or [B, 1].
    """

    logits: Tensor  # [B, C], of the ranking model
    ids: IDVectors  # of the ranked rows
    content: ContentVectors | None  # of the ranked rows; its `read_history` is a collective
    batch: Batch
    # [B] of each extra column that the loss lists; NaN: no value.
    columns: dict[str, Tensor] = field(default_factory=dict)


class AuxiliaryLosses(nn.Module):
    """Weighted sum of auxiliary losses; `extra` has the extra columns in the schema's order."""

    def __init__(
        self, losses: Mapping[str, nn.Module], weights: Mapping[str, float], extra: list[str]
    ) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(losses)
        self.weights, self.extra = dict(weights), extra

    def forward(self, inputs: AuxiliaryInputs) -> tuple[Tensor, dict[str, Tensor]]:
        terms = {}
        for name, loss in self.losses.items():
            inputs.columns = {
                column: cast(Tensor, inputs.batch.rows.extra)[:, self.extra.index(column)]
                for column in getattr(loss, "columns", ())
            }
            terms[name] = loss(inputs)
        total = torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
        return total, terms


class Distillation(nn.Module):
    """Pulls the logits towards a teacher's, which are in a `column` of kind `extra`.

    The teacher's probability sigmoid(t / T) is the target of sigmoid(z / T); the loss is multiplied
    by T squared (Hinton et al. 2015, arXiv 1503.02531). T is `temperature`. `loss` is `bce`, the
    cross-entropy, or `kl`, the divergence. A row without a teacher's logit has loss 0.

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
        counts = is_known * inputs.batch.rows.loss_weights
        return (losses * counts).mean() * self.temperature**2


def build_auxiliary(
    settings: Mapping[str, AuxiliarySettings], schema: Schema
) -> AuxiliaryLosses | None:
    """Return the losses that `auxiliary` names; None if it names none."""
    extra, losses = schema.of_kind("extra"), {}
    for name, entry in settings.items():
        where = f"auxiliary.{name}"
        if name in RESERVED_NAMES or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"{where}: a loss cannot have this name; choose another")
        loss = make_part(f"{where}.loss", entry.loss, LOSSES, nn.Module, **entry.options)
        if unknown := sorted(set(getattr(loss, "columns", ())) - set(extra)):
            raise ValueError(
                f"{where}: column '{unknown[0]}' is not of kind extra in schema.yaml, which has "
                f"{extra}; add it there"
            )
        labels = schema.of_kind("label")
        if isinstance(loss, Distillation) and loss.label not in range(len(labels)):
            raise ValueError(
                f"{where}.options.label is {loss.label!r}; it is the number of a label, from 0 on, "
                f"among {labels}"
            )
        if isinstance(loss, Distillation) and schema.label_losses[loss.label] != "bce":
            raise ValueError(
                f"{where}.options.label is {loss.label}, which has loss "
                f"{schema.label_losses[loss.label]}; a distillation needs a label of 0 and 1"
            )
        losses[name] = loss
    weights = {name: entry.weight for name, entry in settings.items()}
    return AuxiliaryLosses(losses, weights, extra) if losses else None
