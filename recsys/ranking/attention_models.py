"""Ranking models that attend to the history: DIN, MMoE, SIM, HSTU and the causal transformer.

DIN: Zhou et al. 2018, arXiv 1706.06978, with ReLU and softmax; the default has a head of DCN-v2
(Wang et al. 2020, arXiv 2008.13535). MMoE: Ma et al., KDD 2018. SIM (Pi et al. 2020, arXiv
2006.05639) searches a long history for items similar to the target, by cosine of content (MUSE,
arXiv 2512.07216) or dot product of ID vectors, then attends to these. The last token of HSTU and
of the transformer is the ranked item.
Shapes: B batch, W width of the features, E experts, H units of an expert, or heads, C labels,
U unique history items, N history items of the batch, K selected history items, D dimension,
P parallel lists, A ages.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torchrec.modules.crossnet import LowRankCrossNet

from recsys.config import ContentSettings
from recsys.content.dropout import Dropout
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.data.jagged_history import JaggedHistory
from recsys.ranking.layers.causal_layers import HstuEncoder, TransformerEncoder
from recsys.ranking.layers.content_interest import cosines
from recsys.ranking.layers.fields import history_numbers
from recsys.ranking.layers.heads import multilayer_perceptron, ranking_head
from recsys.ranking.layers.row_features import AttendedFeatures, RowFeatures
from recsys.ranking.layers.sequence_encoder import NUM_AGES, SequenceEncoder, TimeGaps, age_row
from recsys.ranking.settings import (
    DinDcnSettings,
    DinSettings,
    HstuSettings,
    MmoeSettings,
    SequenceSettings,
    SimSettings,
    TransformerSettings,
)
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


class AgedAttention(nn.Module):
    """SIM's exact search unit: H heads over items and the time since each -> one vector."""

    def __init__(self, dim: int, num_parallel: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, dim**-0.5
        self.query = nn.Linear(dim, num_heads * dim)
        self.ages = nn.Embedding(NUM_AGES, dim)
        nn.init.normal_(self.ages.weight, std=0.01)
        self.parallel_map = nn.Linear(num_parallel, dim, bias=False) if num_parallel else None
        self.output = nn.Linear(num_heads * dim, dim, bias=False)

    def forward(
        self, target: Tensor, items: Tensor, history: JaggedHistory, parallel: Tensor, ages: Tensor
    ) -> Tensor:  # [B, D], [U, D], [K, P], [K] -> [B, D]
        items = items.float()
        queries = self.query(target).float().unflatten(1, (self.num_heads, -1)) * self.scale
        heads = [
            self._head(query.contiguous(), items, history, parallel, ages)
            for query in queries.unbind(dim=1)
        ]
        return self.output(torch.cat(heads, dim=1))

    def _head(
        self, query: Tensor, items: Tensor, history: JaggedHistory, parallel: Tensor, ages: Tensor
    ) -> Tensor:  # [B, D], [U, D], [K, P], [K] -> [B, D]
        age_scores = query @ self.ages.weight.T  # [B, A]
        cells = history.rows * NUM_AGES + ages  # in [B, A], flattened
        scores = history.dot(query, items) + age_scores.flatten().float()[cells]
        if self.parallel_map is not None:
            list_factors = (query @ self.parallel_map.weight).float()
            scores = scores + (history.spread(list_factors) * parallel).sum(dim=1)
        weights = history.softmax(scores)
        interest = history.weighted_sum(weights, items)
        by_age = weights.new_zeros(age_scores.numel()).index_add(0, cells, weights)
        interest = interest + by_age.view_as(age_scores) @ self.ages.weight
        if self.parallel_map is not None:
            interest = interest + self.parallel_map(history.sum(weights.unsqueeze(1) * parallel))
        return interest


class Sim(RowFeatures):
    """Search, then attention to the items found -> one logit per label.

    An item's age is its number in the list `ranking.time_gaps`, or the number of newer items.
    """

    Settings = SimSettings
    reads_host_lengths = True  # of the histories: no graph of torch.compile

    def __init__(
        self, settings: SimSettings, dimensions: InputDimensions, content: ContentSettings | None
    ) -> None:
        if content is not None and content.history.recent:
            raise ValueError(
                f"content.history.recent is {content.history.recent}, but ranking.name sim attends "
                "to items that its search finds, not to the latest; remove one of them"
            )
        self.gaps = TimeGaps(settings.time_gaps, dimensions)
        dimensions = replace(dimensions, num_parallel=len(self.gaps.flags))
        interest = AgedAttention(dimensions.id_dim, dimensions.num_parallel, settings.search_heads)
        super().__init__(settings, dimensions.id_dim, dimensions, content)
        self.interest, self.top_k = interest, settings.search_top_k
        self.mlp = ranking_head(self.feature_dim, settings, dimensions.num_labels)

    def forward(self, ids: IDVectors, content: ContentVectors | None, batch: Batch) -> Logits:
        history = batch.history.jagged()
        id_history = history if ids.history_is_unique else history.unindexed()
        indices = self.search(ids, content, history)
        ages = self._ages(batch, history)[indices]
        parallel = batch.history.values[:, self.gaps.flags]
        numbers = history_numbers(history, parallel)
        history, id_history = history.select(indices), id_history.select(indices)
        parallel = parallel[indices]
        interest = self.interest(ids.target, ids.history, id_history, parallel, ages)
        return self.mlp(self.features(ids, content, batch, interest, numbers, history, parallel))

    @torch.no_grad()
    def search(
        self, ids: IDVectors, content: ContentVectors | None, history: JaggedHistory
    ) -> Tensor:  # [K]
        """Return the indices of the history items most similar to each target, ascending."""
        if content is None or self.content_interest is None:
            id_history = history if ids.history_is_unique else history.unindexed()
            scores = id_history.dot(ids.target.float(), ids.history.float())
        else:
            items, modalities = content.read_history()
            scores = cosines(content.target, items, history)
            for spaces in zip(content.target_modalities.unbind(1), modalities.unbind(1)):
                scores = scores + cosines(*spaces, history)
        return history.highest(scores, self.top_k)

    def _ages(self, batch: Batch, history: JaggedHistory) -> Tensor:  # [N]
        column = self.gaps.column
        return age_row(history.ages if column is None else batch.history.recorded_values[:, column])


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

    def forward(self, ids: IDVectors, content: ContentVectors | None, batch: Batch) -> Logits:
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
