"""DIN with a DCN-v2 head: the default ranking model, over ID and content vectors.

Target attention (DIN) over the ID history and, where there is content, over the content history;
then a low-rank cross network (DCN-v2, Wang et al. 2020, arXiv 2008.13535) and an MLP over all
vectors and dense features. Without content it is the ID-only twin: the same parts, fewer vectors.

Shapes: B batch, D dimension, F dense features, P parallel lists of the history.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.modules.crossnet import LowRankCrossNet

from recsys.batch import Batch
from recsys.config import ContentSettings, RankingSettings
from recsys.dropout import Dropout
from recsys.ranking.content_interest import ContentInterest
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.target_attention import TargetAttention
from recsys.vectors import ContentVectors, IDVectors


class DinDcn(nn.Module):
    """ID vectors, content vectors and dense features -> one logit per label."""

    def __init__(
        self,
        settings: RankingSettings,
        dimensions: InputDimensions,
        content: ContentSettings | None,
    ) -> None:
        super().__init__()
        self.interest = TargetAttention(
            dimensions.id_dim, dimensions.num_parallel, settings.attention_units
        )
        width = sum(dimensions.pooled_dims) + dimensions.id_dim + self.interest.output_dim
        width += dimensions.num_dense
        self.content_interest: ContentInterest | None = None
        if content is not None:
            self.content_interest = ContentInterest(
                content.dim,
                len(content.modalities),
                dimensions.num_parallel,
                content.history,
            )
            width += content.dim + self.content_interest.output_dim
        self.cross = LowRankCrossNet(width, settings.cross_layers, settings.cross_rank)
        layers: list[nn.Module] = [Dropout(settings.dropout)]
        for units in settings.mlp_units:
            layers += [nn.Linear(width, units), nn.ReLU(), Dropout(settings.dropout)]
            width = units
        self.mlp = nn.Sequential(*layers, nn.Linear(width, dimensions.num_labels))

    def forward(
        self, ids: IDVectors, content: ContentVectors | None, batch: Batch
    ) -> Tensor:  # [B, number of labels]
        history = batch.jagged_history()
        id_history = history if ids.history_is_unique else history.unindexed()
        vectors = [
            batch.dense_features,
            *ids.pooled,
            ids.target,
            self.interest(ids.target, ids.history, id_history, batch.history_values),
        ]
        if self.content_interest is not None:
            assert content is not None
            vectors += [
                content.target,
                self.content_interest(content, history, batch.history_values),
            ]
        return self.mlp(self.cross(torch.cat(vectors, dim=1)))
