"""The base of sequence models: all features of a row as one vector, after attention to the history.

The vector joins the interest of the ID history and, with content, that of the content history to
the pooled ID vectors, the target and the dense features. DIN, DIN with a DCN-v2 head, SIM and MMoE
differ in the layers on top of this vector, or in the history items that they attend to.

Numbers rather than vectors (dense features, numbers of the history's lists, content similarities)
can be standardised before they are joined to the vectors: `ranking.standardize_numbers`.

Shapes: B batch, K history items that are attended to, P parallel lists, D dimension of ID vectors,
W width of the vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys.config import ContentSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.data.jagged_history import JaggedHistory
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.layers.content_interest import ContentInterest
from recsys.ranking.layers.history_numbers import history_numbers, num_history_numbers
from recsys.ranking.layers.opinion_votes import NUM_VOTES, OpinionVotes
from recsys.ranking.layers.standardization import Standardization
from recsys.ranking.layers.target_attention import TargetAttention
from recsys.ranking.settings import AttendedSettings, NumbersSettings
from recsys.ranking.vectors import IDVectors


class RowFeatures(nn.Module):
    """ID vectors, content vectors and dense features -> one vector [B, W] per row.

    A base class: models add layers of their own on top of `features`, which are `feature_dim` wide.
    Without content it is the ID-only twin: the same parts, fewer vectors.

    Args:
        settings: `standardize_numbers`, `opinions` and `opinion_groups`.
        interest_dim: width of the interest in the ID history, which the model itself computes.
        dimensions: widths and names of the inputs.
        content: settings of the content branch; None for the ID-only twin.

    Raises:
        ValueError: `ranking.opinions` names no list beside the history, or items have no rows of
            their own.
    """

    def __init__(
        self,
        settings: NumbersSettings,
        interest_dim: int,
        dimensions: InputDimensions,
        content: ContentSettings | None,
    ) -> None:
        super().__init__()
        width = sum(dimensions.pooled_dims) + dimensions.id_dim + interest_dim
        numbers = dimensions.num_dense + num_history_numbers(dimensions.num_parallel)
        self.opinion_votes: OpinionVotes | None = None
        if settings.opinions is not None:
            self.opinion_votes = _opinion_votes(settings, dimensions)
            numbers += NUM_VOTES
        self.content_interest: ContentInterest | None = None
        if content is not None:
            self.content_interest = ContentInterest.of(content, dimensions.num_parallel)
            width += 2 * content.dim
            numbers += self.content_interest.output_dim - content.dim
        self.feature_dim = width + numbers
        self.standardization: Standardization | None = None
        if settings.standardize_numbers:
            self.standardization = Standardization(numbers, dimensions.process_group)

    def history_numbers(
        self, history: JaggedHistory, parallel: Tensor, batch: Batch
    ) -> Tensor:  # [N, P] -> [B, number of them]
        """Return `history_numbers` of the whole history, and the votes by opinions, if any."""
        numbers = history_numbers(history, parallel)
        if self.opinion_votes is None:
            return numbers
        return torch.cat([numbers, self.opinion_votes(history, batch)], dim=1)

    def features(
        self,
        ids: IDVectors,
        content: ContentVectors | None,
        batch: Batch,
        interest: Tensor,  # [B, interest_dim]
        numbers: Tensor,  # [B, ...], `self.history_numbers` of the whole history
        history: JaggedHistory,  # the one attended to, over `batch.history_items`
        parallel: Tensor,  # [K, P]
    ) -> Tensor:  # [B, W]
        """Return all vectors and numbers of each row, concatenated.

        A collective with content, which reads the history's vectors, or with standardisation in
        training.
        """
        of_content, similarities = [], []
        if self.content_interest is not None:
            assert content is not None
            interests = self.content_interest(content, history, parallel)
            dim = content.target.shape[1]
            of_content, similarities = [content.target, interests[:, :dim]], [interests[:, dim:]]
        dense, numbers, *similarities = self._standardized(
            [batch.dense_features, numbers, *similarities], batch
        )
        vectors = [dense, *ids.pooled, ids.target, interest, numbers, *of_content, *similarities]
        return torch.cat(vectors, dim=1)

    def _standardized(self, numbers: list[Tensor], batch: Batch) -> list[Tensor]:
        """Standardise all parts in one call, so that ranks exchange one message. A collective."""
        if self.standardization is None:
            return numbers
        widths = [part.shape[1] for part in numbers]
        joined = self.standardization(torch.cat(numbers, dim=1), batch.row_weights)
        return list(joined.split(widths, dim=1))


def _opinion_votes(settings: NumbersSettings, dimensions: InputDimensions) -> OpinionVotes:
    """Return the votes by the list that `ranking.opinions` names."""
    name, names = settings.opinions, dimensions.parallel_names
    if name not in names:
        raise ValueError(
            f"ranking.opinions is '{name}'; the lists of numbers beside the history in schema.yaml "
            f"are {list(names)}"
        )
    if not dimensions.num_items:
        raise ValueError(
            f"ranking.opinions is '{name}', but rows of a bounded vocabulary pass from item to "
            "item, and opinions would stay with the row; set ranking.opinions to null"
        )
    groups = settings.opinion_groups
    assert groups is not None  # `recsys.model.build.with_opinion_groups` has set it
    place = names.index(name)
    return OpinionVotes(place, dimensions.num_items, groups, settings.opinion_dropout)


class AttendedFeatures(RowFeatures):
    """`RowFeatures` with DIN's target attention over all of the history.

    Args:
        settings: `attention_units` and `standardize_numbers`.
        dimensions, content: as in `RowFeatures`.
    """

    def __init__(
        self,
        settings: AttendedSettings,
        dimensions: InputDimensions,
        content: ContentSettings | None,
    ) -> None:
        interest = TargetAttention(
            dimensions.id_dim, dimensions.num_parallel, settings.attention_units
        )
        super().__init__(settings, dimensions.id_dim, dimensions, content)
        self.interest = interest

    def attended(
        self, ids: IDVectors, content: ContentVectors | None, batch: Batch
    ) -> Tensor:  # [B, W]
        """Return `features` with the interest in the whole history."""
        history = batch.jagged_history()
        id_history = history if ids.history_is_unique else history.unindexed()
        parallel = batch.history_values
        interest = self.interest(ids.target, ids.history, id_history, parallel)
        numbers = self.history_numbers(history, parallel, batch)
        return self.features(ids, content, batch, interest, numbers, history, parallel)
