"""Backbones over DIN's target attention: DIN, DIN with a DCN-v2 head (the default), and MMoE.

DIN: Zhou et al. 2018, arXiv 1706.06978, with ReLU and softmax. DCN-v2: Wang et al. 2020, arXiv
2008.13535. MMoE: Ma et al., KDD 2018.
Shapes: B batch, W width of the features, E experts, H units of an expert, C labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.modules.crossnet import LowRankCrossNet

from recsys.config import ContentSettings
from recsys.content.dropout import Dropout
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.ranking.layers.heads import multilayer_perceptron, ranking_head
from recsys.ranking.layers.row_features import AttendedFeatures
from recsys.ranking.settings import DinDcnSettings, DinSettings, MmoeSettings
from recsys.ranking.vectors import IDVectors, InputDimensions, Logits


class Din(AttendedFeatures):
    """Target attention, then an MLP -> one logit per label."""

    Settings = DinSettings

    def __init__(
        self, settings: DinSettings, dimensions: InputDimensions, content: ContentSettings | None
    ) -> None:
        super().__init__(settings, dimensions, content)
        self.mlp = ranking_head(self.feature_dim, settings, dimensions.num_labels)

    def forward(self, ids: IDVectors, content: ContentVectors | None, batch: Batch) -> Logits:
        return self.mlp(self.attended(ids, content, batch))


class DinDcn(AttendedFeatures):
    """Target attention, then a cross network and an MLP -> one logit per label."""

    Settings = DinDcnSettings

    def __init__(
        self, settings: DinDcnSettings, dimensions: InputDimensions, content: ContentSettings | None
    ) -> None:
        super().__init__(settings, dimensions, content)
        width = self.feature_dim
        self.cross = LowRankCrossNet(width, settings.cross_layers, settings.cross_rank)
        # The cross network has mixed all inputs: a dropped unit is never the only copy of one.
        self.mlp = ranking_head(width, settings, dimensions.num_labels, drops_inputs=True)

    def forward(self, ids: IDVectors, content: ContentVectors | None, batch: Batch) -> Logits:
        return self.mlp(self.cross(self.attended(ids, content, batch)))


class Mmoe(AttendedFeatures):
    """Experts that all labels share, a gate and a tower per label -> one logit per label.

    The first of `ranking.mlp_units` is the width of an expert; the others are a tower's layers.
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
        width, (units, *tower_units) = self.feature_dim, settings.mlp_units
        self.num_experts, self.num_labels = settings.num_experts, dimensions.num_labels
        self.dropout = Dropout(settings.dropout)
        self.experts = nn.Linear(width, self.num_experts * units)
        self.gates = nn.Linear(width, self.num_labels * self.num_experts, bias=False)
        self.towers = nn.ModuleList(
            multilayer_perceptron(units, tower_units, settings.dropout, num_outputs=1)
            for _ in range(self.num_labels)
        )

    def mixtures(self, features: Tensor) -> Tensor:  # [B, W] -> [B, C, H]
        experts = self.dropout(torch.relu(self.experts(features)))
        experts = experts.unflatten(1, (self.num_experts, -1))
        gates = self.gates(features).unflatten(1, (self.num_labels, self.num_experts))
        return gates.softmax(dim=2) @ experts

    def forward(self, ids: IDVectors, content: ContentVectors | None, batch: Batch) -> Tensor:
        mixtures = self.mixtures(self.attended(ids, content, batch)).unbind(dim=1)
        logits = [tower(mixture) for tower, mixture in zip(self.towers, mixtures)]
        return torch.cat(logits, dim=1)
