"""MMoE: experts shared by all labels, mixed by one gate per label (Ma et al., KDD 2018).

The experts read the same features as DIN's head. Each label has a softmax gate over the experts and
a tower on top of its mixture, so that labels that disagree need not share all parameters. With one
label it is a mixture of experts.

Shapes: B batch, W width of the features, E experts, H units of an expert, C labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys.config import ContentSettings
from recsys.content.dropout import Dropout
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.layers.attended_features import AttendedFeatures
from recsys.ranking.layers.mlp import multilayer_perceptron
from recsys.ranking.settings import MmoeSettings
from recsys.ranking.vectors import IDVectors


class Mmoe(AttendedFeatures):
    """ID vectors, content vectors and dense features -> one logit per label.

    The first of `ranking.mlp_units` is the width of an expert; the others are a tower's layers.

    Raises:
        ValueError: `ranking.mlp_units` is empty.
    """

    Settings = MmoeSettings

    def __init__(
        self, settings: MmoeSettings, dimensions: InputDimensions, content: ContentSettings | None
    ) -> None:
        super().__init__(settings, dimensions, content)
        if not settings.mlp_units:
            raise ValueError(
                "ranking.mlp_units is empty, but the first of them are the units of an expert of "
                "mmoe; give at least one layer"
            )
        width, (units, *of_towers) = self.feature_dim, settings.mlp_units
        self.num_experts, self.num_labels = settings.num_experts, dimensions.num_labels
        self.dropout = Dropout(settings.dropout)
        self.experts = nn.Linear(width, self.num_experts * units)
        self.gates = nn.Linear(width, self.num_labels * self.num_experts, bias=False)
        self.towers = nn.ModuleList(
            multilayer_perceptron(units, settings, 1, of_towers) for _ in range(self.num_labels)
        )

    def mixtures(self, features: Tensor) -> Tensor:  # [B, W] -> [B, C, H]
        """Return the outputs of the experts, mixed by each label's gate."""
        experts = self.dropout(torch.relu(self.experts(features)))
        experts = experts.unflatten(1, (self.num_experts, -1))
        gates = self.gates(features).unflatten(1, (self.num_labels, self.num_experts))
        return gates.softmax(dim=2) @ experts

    def forward(
        self, ids: IDVectors, content: ContentVectors | None, batch: Batch
    ) -> Tensor:  # [B, C]
        """Return the logits of a batch."""
        mixtures = self.mixtures(self.attended(ids, content, batch)).unbind(dim=1)
        logits = [tower(mixture) for tower, mixture in zip(self.towers, mixtures)]
        return torch.cat(logits, dim=1)
