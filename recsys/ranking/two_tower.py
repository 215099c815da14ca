"""Two towers: a query vector and an item vector whose dot product is the logit, for retrieval.

With content both vectors also carry directions of content: the mean cosine of an item to the
history is the dot product of its direction with the mean of their directions.
Shapes: B batch, S sampled negatives, C labels, D width of a tower's vector, V width of both vectors
with the directions, I width of ID vectors, E content dimension, M modalities, P parallel lists,
H half-lives, N history items of the batch.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config import ContentSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.data.jagged_history import JaggedHistory
from recsys.ranking.layers.causal_layers import HstuEncoder, TransformerEncoder
from recsys.ranking.layers.fields import (
    history_numbers,
    num_history_numbers,
    pooled_history,
    pooling_weights,
)
from recsys.ranking.layers.heads import multilayer_perceptron
from recsys.ranking.settings import QuerySettings, TwoTowerSettings
from recsys.ranking.vectors import IDVectors, InputDimensions, TowerVectors

ENCODERS = {"hstu": HstuEncoder, "transformer": TransformerEncoder}


@dataclass(frozen=True)
class HistoryMeans:
    """The history of a batch, and how its items are weighted in each of 1 + P + H means."""

    history: JaggedHistory
    parallel: Tensor  # [N, P]
    weights: list[Tensor]  # 1 + P + H of [N]


class QueryTower(nn.Module):
    """The user tower, base of retrieval models; it does not read the ranked item."""

    def __init__(
        self,
        settings: QuerySettings,
        dimensions: InputDimensions,
        content: ContentSettings | None,
        outputs: int,
    ) -> None:
        super().__init__()
        if content is not None and content.history.top_k:
            raise ValueError(
                f"content.history.top_k is {content.history.top_k}, which chooses the items of a "
                f"history by the ranked item: no user tower of {settings.name} may know that item; "
                "set top_k to 0"
            )
        self.pooled, self.dense = _query_columns(settings, dimensions)
        self.has_history, self.num_labels = dimensions.has_history, dimensions.num_labels
        self.reads_content = content is not None
        self.num_parallel, self.half_lives = dimensions.num_parallel, settings.history_half_lives
        width = sum(dimensions.pooled_dims[index] for index in self.pooled) + len(self.dense)
        self.num_means = 1 + self.num_parallel + len(self.half_lives)
        if self.half_lives and not self.has_history:
            raise ValueError(
                f"ranking.history_half_lives is {self.half_lives}, and schema.yaml has no column "
                "of kind sequence; remove it"
            )
        if self.has_history:
            dim = dimensions.id_dim + (0 if content is None else content.dim)
            width += self.num_means * dim + num_history_numbers(self.num_parallel)
        self.encoder: nn.Module | None = None
        if settings.history_encoder != "mean":
            if not self.has_history:
                raise ValueError(
                    f"ranking.history_encoder is {settings.history_encoder}, and schema.yaml has "
                    "no column of kind sequence; set it to mean"
                )
            encoder = ENCODERS[settings.history_encoder]
            relative = isinstance(settings, TwoTowerSettings) and settings.target_positions == "all"
            self.encoder = encoder(settings, dimensions, content, False, relative)
            self.reads_host_lengths = True  # of the histories: no graph of torch.compile
            width += settings.sequence_dim
        units, dropout = settings.mlp_units, settings.dropout
        self.query_tower = multilayer_perceptron(width, units, dropout, outputs)

    def means(self, batch: Batch) -> HistoryMeans | None:
        """Return the means of the history, if there is one."""
        if not self.has_history:
            return None
        history, parallel = batch.history.jagged(), batch.history.values[:, : self.num_parallel]
        weights = pooling_weights(history, parallel, self.half_lives)
        return HistoryMeans(history, parallel, weights)

    def user(
        self,
        ids: IDVectors,
        content: ContentVectors | None,
        batch: Batch,
        means: HistoryMeans | None,  # the result of `means`
    ) -> Tensor:
        """Return the tower's output for each row [B, outputs]. A collective with content."""
        content = content if self.reads_content else None
        vectors = [ids.pooled[index] for index in self.pooled]
        vectors.append(batch.dense_features[:, self.dense])
        if means is not None:
            history, weights = means.history, means.weights
            id_history = history if ids.history_is_unique else history.unindexed()
            vectors += pooled_history(ids.history.float(), id_history, weights)
            vectors.append(history_numbers(history, means.parallel))
            if content is not None:
                items = content.read_history()[0].float()
                vectors += pooled_history(items, history, weights)
        if self.encoder is not None:
            vectors.append(self.encoder(ids, content, batch))
        return self.query_tower(torch.cat(vectors, dim=1))


class TwoTower(QueryTower):
    """ID vectors, content vectors and dense features -> `TowerVectors`."""

    Settings = TwoTowerSettings

    def __init__(
        self,
        settings: TwoTowerSettings,
        dimensions: InputDimensions,
        content: ContentSettings | None,
    ) -> None:
        if settings.target_positions == "all":
            _check_all_positions(dimensions)
            dimensions = replace(dimensions, num_parallel=0, parallel_names=())
        super().__init__(settings, dimensions, content, dimensions.num_labels * settings.tower_dim)
        self.temperature, units, dim = settings.temperature, settings.mlp_units, settings.tower_dim
        item_width = dimensions.id_dim + (0 if content is None else content.dim)
        self.similarity: Similarity | None = None
        if content is not None and content.history.similarity_features and self.has_history:
            means = 1 + dimensions.num_parallel
            self.similarity = Similarity(1 + len(content.modalities), means)
        self.item_tower = multilayer_perceptron(item_width, units, settings.dropout, dim)
        self.history_weights: nn.Parameter | None = None  # [C, 1 + P + H]
        if settings.history_in_item_tower:
            self.history_weights = self._history_weights(dimensions)
        # Softmax losses cancel a bias.
        is_pointwise = settings.loss == "pointwise"
        self.bias = nn.Parameter(torch.zeros(self.num_labels)) if is_pointwise else None

    def forward(self, ids: IDVectors, content: ContentVectors | None, batch: Batch) -> TowerVectors:
        """Return query vectors [B, C, V], item vectors [B, V] and those of negatives [S, V]."""
        content = content if self.reads_content else None
        means = self.means(batch)
        query = self.user(ids, content, batch, means).unflatten(1, (self.num_labels, -1))
        query = F.normalize(query, dim=2)  # [B, C, D]
        if self.history_weights is not None:
            assert means is not None
            query = F.normalize(query + self._history_vectors(ids, content, means), dim=2)
        item, negatives = self._target_and_negatives(ids, content)
        if self.similarity is not None:
            assert content is not None and means is not None
            weights = means.weights[: 1 + self.num_parallel]
            direction = self.similarity.query(content, means.history, weights)
            direction = direction.unsqueeze(1).expand(-1, self.num_labels, -1)
            query = torch.cat([query, direction.to(query.dtype)], dim=2)
            item = self.similarity.item(item, content.target, content.target_modalities)
            if negatives is not None:
                negatives = self.similarity.item(
                    negatives, content.negatives, content.negative_modalities
                )
        return TowerVectors(query / self.temperature, item, negatives, self.bias)

    def _history_weights(self, dimensions: InputDimensions) -> nn.Parameter:
        """Return weights of zero for means by the history's lists, and of one for other means."""
        if not dimensions.has_history:
            raise ValueError(
                "ranking.history_in_item_tower is true, and schema.yaml has no column of kind "
                "sequence; set it to false"
            )
        weights = torch.ones(dimensions.num_labels, self.num_means)
        weights[:, 1 : 1 + self.num_parallel] = 0
        return nn.Parameter(weights)

    def _history_vectors(
        self, ids: IDVectors, content: ContentVectors | None, means: HistoryMeans
    ) -> Tensor:  # [B, C, D]
        """Return weighted means of the history's item vectors. A collective with content."""
        history = means.history
        content_vectors = None if content is None else content.read_history()[0].float()
        if not ids.history_is_unique:
            if content_vectors is not None:
                content_vectors = history.gather(content_vectors)
            history = history.unindexed()
        assert self.history_weights is not None
        items = self._item(ids.history.float(), content_vectors)
        vectors = pooled_history(items, history, means.weights)  # 1 + P + H of [B, D]
        return self.history_weights @ torch.stack(vectors, dim=1)

    def _target_and_negatives(
        self, ids: IDVectors, content: ContentVectors | None
    ) -> tuple[Tensor, Tensor | None]:  # [B, D], [S, D]
        """Return item vectors of targets and of negatives, if there are any, by one pass."""
        content_vectors = None if content is None else content.target
        if ids.negatives is None:
            return self._item(ids.target, content_vectors), None
        if content is not None:
            assert content.negatives is not None
            content_vectors = torch.cat([content.target, content.negatives])
        items = self._item(torch.cat([ids.target, ids.negatives]), content_vectors)
        return items[: len(ids.target)], items[len(ids.target) :]

    def _item(self, id_vector: Tensor, content_vector: Tensor | None) -> Tensor:
        vectors = [id_vector] if content_vector is None else [id_vector, content_vector]
        return F.normalize(self.item_tower(torch.cat(vectors, dim=1)), dim=1)


class Similarity(nn.Module):
    """Mean cosines of an item to a history, as a dot product of a query part and an item part.

    The weights [1 + M, 1 + P] start at zero: per space, of the mean and of each list's mean.
    """

    def __init__(self, num_spaces: int, num_means: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_spaces, num_means))

    def query(
        self, content: ContentVectors, history: JaggedHistory, pooling: list[Tensor]
    ) -> Tensor:
        """Return weighted mean directions of the items, [B, (1 + M) * E]. A collective.

        `pooling` has the weights of each mean, 1 + P of [N].
        """
        items, modalities = content.read_history()
        spaces = [items, *modalities.unbind(dim=1)]
        directions = []
        for vectors, weights in zip(spaces, self.weights, strict=True):
            means = pooled_history(F.normalize(vectors.float(), dim=1), history, pooling)
            directions.append(torch.stack(means, dim=2) @ weights)
        return torch.cat(directions, dim=1)

    def item(self, item: Tensor, content: Tensor | None, modalities: Tensor | None) -> Tensor:
        assert content is not None and modalities is not None
        spaces = [content, *modalities.unbind(dim=1)]
        return torch.cat([item, *(F.normalize(vectors, dim=1) for vectors in spaces)], dim=1)


def _check_all_positions(dimensions: InputDimensions) -> None:
    if dimensions.further_histories:
        raise ValueError(
            "ranking.target_positions is all, but the model has further sequences, which are of "
            "the row's moment, so that a history has no reading at each of its items; set it to "
            "last"
        )


def _query_columns(
    settings: QuerySettings, dimensions: InputDimensions
) -> tuple[list[int], list[int]]:
    columns = [*dimensions.pooled_names, *dimensions.dense_names]
    if dimensions.group in dimensions.item_columns:
        raise ValueError(
            f"group '{dimensions.group}' is made of the ranked item or looked up by it, and "
            f"{settings.name} reads it of the user: recall would be far too high; name a column of "
            "the user as group in schema.yaml"
        )
    for name in settings.query_features:
        if name not in columns:
            raise ValueError(
                f"ranking.query_features: '{name}' is no pooled or dense column of the model; "
                f"these are {columns}"
            )
        if name in dimensions.item_columns:
            raise ValueError(
                f"ranking.query_features: '{name}' is made of the ranked item or looked up by it, "
                "and no user tower may know it: recall would be far too high; leave it out"
            )
    query_columns = {dimensions.group, *settings.query_features, *dimensions.further_histories}
    pooled = [index for index, name in enumerate(dimensions.pooled_names) if name in query_columns]
    dense = [index for index, name in enumerate(dimensions.dense_names) if name in query_columns]
    if not pooled and not dense and not dimensions.has_history:
        raise ValueError(
            f"{settings.name} has nothing to read: there is no history, and none of {columns} is "
            f"the group '{dimensions.group}' or in ranking.query_features; name columns there"
        )
    return pooled, dense
