"""DIN: target attention over the history, then an MLP (Zhou et al. 2018, arXiv 1706.06978).

As in the paper, but for ReLU in place of PReLU and Dice, and a softmax over the scores, so that
long and short histories weigh alike.

Shapes: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from recsys.config import ContentSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.layers.attended_features import AttendedFeatures, AttendedSettings
from recsys.ranking.layers.mlp import HeadSettings, ranking_head
from recsys.ranking.vectors import IDVectors, MemberLogits


@dataclass
class DinSettings(AttendedSettings, HeadSettings):
    """Settings of DIN."""

    name: str = "din"


class Din(AttendedFeatures):
    """ID vectors, content vectors and dense features -> one logit per label."""

    Settings = DinSettings

    def __init__(
        self,
        settings: DinSettings,
        dimensions: InputDimensions,
        content: ContentSettings | None,
    ) -> None:
        super().__init__(settings, dimensions, content)
        self.mlp = ranking_head(self.feature_dim, settings, dimensions.num_labels)

    def forward(
        self, ids: IDVectors, content: ContentVectors | None, batch: Batch
    ) -> Tensor | MemberLogits:  # [B, number of labels]
        return self.mlp(self.attended(ids, content, batch))
