"""Ranking models over a sequence encoder, whose last token is the ranked item: HSTU, transformer.

Shapes: B batch, C labels.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from recsys.config import ContentSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.ranking.layers.causal_layers import HstuEncoder, TransformerEncoder
from recsys.ranking.layers.fields import history_numbers
from recsys.ranking.layers.heads import ranking_head
from recsys.ranking.layers.row_features import RowFeatures
from recsys.ranking.layers.sequence_encoder import SequenceEncoder
from recsys.ranking.settings import HstuSettings, SequenceSettings, TransformerSettings
from recsys.ranking.vectors import IDVectors, InputDimensions, MemberLogits


class SequenceModel(RowFeatures):
    """ID vectors, content vectors and dense features -> one logit per label."""

    Encoder: type[SequenceEncoder]
    reads_host_lengths = True  # of the histories: no graph of torch.compile

    def __init__(
        self,
        settings: SequenceSettings,
        dimensions: InputDimensions,
        content: ContentSettings | None,
    ) -> None:
        encoder = self.Encoder(settings, dimensions, content)
        dimensions = replace(dimensions, num_parallel=len(encoder.gaps.flags))
        super().__init__(settings, settings.sequence_dim, dimensions, content)
        self.encoder = encoder
        self.mlp = ranking_head(self.feature_dim, settings, dimensions.num_labels)

    def forward(
        self, ids: IDVectors, content: ContentVectors | None, batch: Batch
    ) -> Tensor | MemberLogits:  # [B, C]
        interest = self.encoder(ids, content, batch)
        history, parallel = batch.history.jagged(), batch.history.values[:, self.encoder.gaps.flags]
        numbers = history_numbers(history, parallel)
        return self.mlp(self.features(ids, content, batch, interest, numbers, history, parallel))


class Hstu(SequenceModel):
    """The ranking model over HSTU's encoder."""

    Settings = HstuSettings
    Encoder = HstuEncoder


class Transformer(SequenceModel):
    """The ranking model over the causal transformer."""

    Settings = TransformerSettings
    Encoder = TransformerEncoder
