"""Fields: every vector of a row at one width, as factorisation models (DLRM, DeepFM) need them.

Shapes: B batch, F fields, D dimension of the ID vectors, N history items of the batch, P parallel
lists, H half-lives (in newer items), U unique history items, S similarities, X dense numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recsys.config import ContentSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.data.jagged_history import JaggedHistory
from recsys.ranking.layers.content_interest import ContentInterest
from recsys.ranking.vectors import IDVectors, InputDimensions

HALF_LIVES = (1.0, 3.0, 10.0)  # in newer items


def history_numbers(history: JaggedHistory, parallel: Tensor) -> Tensor:  # [B, P * (1 + H) + 1]
    """Return lists' means, means by half-life, and log(1 + length); 0 for an empty history."""
    num_rows = history.lengths.shape[0]
    if history.is_shared:
        history, parallel = history.one_row(), history.of_one_row(parallel)
    lengths = history.lengths.unsqueeze(1)
    weights = _half_life_weights(history, HALF_LIVES)
    weights = torch.cat([torch.ones_like(weights[:, :1]), weights], dim=1)
    weighted = (parallel.unsqueeze(2) * weights.unsqueeze(1)).flatten(1)  # [N, P * (1 + H)]
    totals = history.sum(weights).clamp(min=1)  # only an empty history has less than 1
    means = history.sum(weighted).view(lengths.shape[0], parallel.shape[1], weights.shape[1])
    means = (means / totals.unsqueeze(1)).flatten(1)
    return torch.cat([means, torch.log1p(lengths.to(means.dtype))], dim=1).expand(num_rows, -1)


def num_history_numbers(num_parallel: int) -> int:
    """Return the number of columns of `history_numbers`."""
    return num_parallel * (1 + len(HALF_LIVES)) + 1


def pooling_weights(
    history: JaggedHistory, parallel: Tensor, half_lives: Sequence[float] = ()
) -> list[Tensor]:  # 1 + P + H of [N]
    """Return the weights of means: of all items, by each of P lists, and by each half-life."""
    share = history.spread(1 / history.lengths.clamp(min=1).to(parallel.dtype).unsqueeze(1))
    weights = [share, share * parallel]
    if half_lives:
        recent = _half_life_weights(history, half_lives)
        weights.append(recent / history.spread(history.sum(recent)))
    return list(torch.cat(weights, dim=1).T.contiguous().unbind())


def pooled_history(items: Tensor, history: JaggedHistory, weights: list[Tensor]) -> list[Tensor]:
    """Return the weighted sums of each history's items [B, D]; zeros for an empty history."""
    return [history.weighted_sum(column.to(items.dtype), items) for column in weights]


def _half_life_weights(history: JaggedHistory, half_lives: Sequence[float]) -> Tensor:  # [N, H]
    """Return 1 for each history's newest item, and half as much with each half-life of age."""
    ages = history.ages.unsqueeze(1)
    # Filled on the device: to copy Python numbers to a GPU would make the host wait.
    lives = torch.cat([torch.full((1,), life, device=ages.device) for life in half_lives])
    # Denormal weights of very old items would be slow, so they are clamped.
    return torch.exp2(-ages / lives).clamp(min=1e-30)


@dataclass
class FieldVectors:
    """Vectors and numbers of each row, for a model of interactions."""

    vectors: list[Tensor]  # F of [B, D]
    numbers: Tensor  # [B, X]
    similarities: Tensor  # [B, S], S = 0 without content

    def dense_and_sparse(self, dense_arch: nn.Module | None) -> tuple[Tensor, list[Tensor]]:
        """Return the dense vector [B, D] (the last field if there is no arch), and the fields."""
        if dense_arch is None:
            return self.vectors[-1], self.vectors[:-1]
        return dense_arch(self.numbers), self.vectors


class Fields(nn.Module):
    """ID vectors, content vectors (None for the ID-only baseline) and numbers -> `FieldVectors`."""

    def __init__(self, dimensions: InputDimensions, content: ContentSettings | None) -> None:
        super().__init__()
        dim = dimensions.id_dim
        self.has_history = dimensions.has_history
        self.pooled_maps = nn.ModuleList(_map(width, dim) for width in dimensions.pooled_dims)
        self.num_fields = len(dimensions.pooled_dims) + 1
        self.num_numbers, self.num_similarities = dimensions.num_dense, 0
        if self.has_history:
            self.num_fields += 1 + dimensions.num_parallel
            self.num_numbers += num_history_numbers(dimensions.num_parallel)
        self.content_interest: ContentInterest | None = None
        if content is not None:
            self.content_interest = ContentInterest.from_settings(content, dimensions.num_parallel)
            self.num_similarities = self.content_interest.output_dim - content.dim
            self.target_map, self.interest_map = _map(content.dim, dim), _map(content.dim, dim)
            self.num_fields += 2
        if self.num_fields == 1 and not self.num_numbers:
            raise ValueError(
                "the target item is the only input, so that a model of interactions has none; add "
                "columns to schema.yaml, or content"
            )

    @property
    def num_interacting(self) -> int:
        """Number of fields that interact with the dense vector, or with the field in its place."""
        return self.num_fields if self.num_numbers else self.num_fields - 1

    def forward(self, ids: IDVectors, content: ContentVectors | None, batch: Batch) -> FieldVectors:
        vectors = [linear(pooled) for linear, pooled in zip(self.pooled_maps, ids.pooled)]
        vectors.append(ids.target)
        numbers, similarities = [batch.dense_features], ids.target[:, :0]
        history, parallel = batch.history.jagged(), batch.history.values
        if self.has_history:
            id_history = history if ids.history_is_unique else history.unindexed()
            vectors += pooled_history(ids.history, id_history, pooling_weights(history, parallel))
            numbers.append(history_numbers(history, parallel))
        if self.content_interest is not None:
            assert content is not None
            interest_features = self.content_interest(content, history, parallel)
            widths = [interest_features.shape[1] - self.num_similarities, self.num_similarities]
            interest, similarities = interest_features.split(widths, dim=1)
            vectors += [self.target_map(content.target), self.interest_map(interest)]
        return FieldVectors(vectors, torch.cat(numbers, dim=1), similarities)


def _map(width: int, dim: int) -> nn.Module:
    return nn.Identity() if width == dim else nn.Linear(width, dim, bias=False)
