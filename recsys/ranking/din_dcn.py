"""DIN with a DCN-v2 head: the default ranking model, over ID and content vectors.

Target attention (DIN) over the ID history and, where there is content, over the content history;
then a low-rank cross network (DCN-v2, Wang et al. 2020, arXiv 2008.13535) and an MLP over all
vectors and dense features. Without content it is the ID-only twin: the same parts, fewer vectors.

Shapes: B batch.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchrec.modules.crossnet import LowRankCrossNet

from recsys.batch import Batch
from recsys.config import ContentSettings, RankingSettings
from recsys.dropout import Dropout
from recsys.ranking.attended_features import AttendedFeatures
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.layers import multilayer_perceptron
from recsys.vectors import ContentVectors, IDVectors


class DinDcn(AttendedFeatures):
    """ID vectors, content vectors and dense features -> one logit per label."""

    def __init__(
        self,
        settings: RankingSettings,
        dimensions: InputDimensions,
        content: ContentSettings | None,
    ) -> None:
        super().__init__(settings, dimensions, content)
        width = self.feature_dim
        self.cross = LowRankCrossNet(width, settings.cross_layers, settings.cross_rank)
        # The cross network has mixed all inputs, so that what is dropped here is nowhere alone.
        top = multilayer_perceptron(width, settings, dimensions.num_labels)
        self.mlp = nn.Sequential(Dropout(settings.dropout), *top)

    def forward(
        self, ids: IDVectors, content: ContentVectors | None, batch: Batch
    ) -> Tensor:  # [B, number of labels]
        return self.mlp(self.cross(self.attended(ids, content, batch)))
