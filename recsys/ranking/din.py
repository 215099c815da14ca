"""DIN: target attention over the history, then an MLP (Zhou et al. 2018, arXiv 1706.06978).

It differs from the paper in two points: ReLU replaces PReLU and Dice, and a softmax normalises the
scores, so that long and short histories weigh alike.

Shapes: B batch, C labels.
"""

from __future__ import annotations

from torch import Tensor

from recsys.config import ContentSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.layers.attended_features import AttendedFeatures
from recsys.ranking.layers.mlp import ranking_head
from recsys.ranking.settings import DinSettings
from recsys.ranking.vectors import IDVectors, MemberLogits


class Din(AttendedFeatures):
    """ID vectors, content vectors and dense features -> one logit per label."""

    Settings = DinSettings

    def __init__(
        self, settings: DinSettings, dimensions: InputDimensions, content: ContentSettings | None
    ) -> None:
        super().__init__(settings, dimensions, content)
        self.mlp = ranking_head(self.feature_dim, settings, dimensions.num_labels)

    def forward(
        self, ids: IDVectors, content: ContentVectors | None, batch: Batch
    ) -> Tensor | MemberLogits:  # [B, C]
        """Return the logits of a batch, or the logits of each member of an ensemble in training."""
        return self.mlp(self.attended(ids, content, batch))
