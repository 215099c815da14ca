"""DIN with a DCN-v2 head: the default ranking model, over ID and content vectors.

Target attention (DIN) over the ID history and, where there is content, over the content history;
then a low-rank cross network (DCN-v2, Wang et al. 2020, arXiv 2008.13535) and an MLP over all
vectors and dense features. Without content it is the ID-only twin: the same parts, fewer vectors.

Shapes: B batch, C labels.
"""

from __future__ import annotations

from torch import Tensor
from torchrec.modules.crossnet import LowRankCrossNet

from recsys.config import ContentSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.layers.attended_features import AttendedFeatures
from recsys.ranking.layers.mlp import ranking_head
from recsys.ranking.settings import DinDcnSettings
from recsys.ranking.vectors import IDVectors, MemberLogits


class DinDcn(AttendedFeatures):
    """ID vectors, content vectors and dense features -> one logit per label."""

    Settings = DinDcnSettings

    def __init__(
        self, settings: DinDcnSettings, dimensions: InputDimensions, content: ContentSettings | None
    ) -> None:
        super().__init__(settings, dimensions, content)
        width = self.feature_dim
        self.cross = LowRankCrossNet(width, settings.cross_layers, settings.cross_rank)
        # The cross network has mixed all inputs: a dropped unit is never the only copy of one.
        self.mlp = ranking_head(width, settings, dimensions.num_labels, drops_inputs=True)

    def forward(
        self, ids: IDVectors, content: ContentVectors | None, batch: Batch
    ) -> Tensor | MemberLogits:  # [B, C]
        """Return the logits of a batch, or the logits of each member of an ensemble in training."""
        return self.mlp(self.cross(self.attended(ids, content, batch)))
