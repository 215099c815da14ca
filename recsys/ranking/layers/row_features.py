"""All features of a row as one vector, after attention to the history: the base of most backbones.

Sequences after the first are encoded into one vector each, which ranking models read as pooled.
Standardised numbers use statistics of all steps and ranks, so rows do not depend on their batch.
Shapes: B batch, K history items that are attended to, P parallel lists, D dimension of ID vectors,
W width of the vector, X numbers.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys.config import ContentSettings, RankingSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.data.jagged_history import JaggedHistory
from recsys.data.schema_columns import HistoryColumns
from recsys.ranking.layers.content_interest import ContentInterest
from recsys.ranking.layers.fields import history_numbers, num_history_numbers
from recsys.ranking.layers.target_attention import HistoryAttention, MeanOfEvents, TargetAttention
from recsys.ranking.settings import AttendedSettings, NumbersSettings
from recsys.ranking.vectors import IDVectors, InputDimensions

STEPS = 1000  # horizon of the running mean; older steps count less and less
LARGEST = 8.0  # standard deviations; larger values are clamped
KNOT_RANGE = (-2.0, 3.5)  # in standard deviations: counts have their mass below the mean
MIN_VARIANCE = 1e-4  # keeps nearly constant numbers from being scaled up


class Standardization(nn.Module):
    """(x - mean) / standard deviation, both running over the steps of training. A collective.

    Padding rows do not count. Each batch of `accumulate_steps` updates the statistics.
    """

    mean: Tensor
    variance: Tensor
    steps: Tensor

    def __init__(self, num_numbers: int, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.process_group = process_group
        self.register_buffer("mean", torch.zeros(num_numbers))
        self.register_buffer("variance", torch.ones(num_numbers))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, numbers: Tensor, row_weights: Tensor | None = None) -> Tensor:  # [B, W]
        """Update the statistics in training, and return the standardised numbers. A collective."""
        if self.training:
            self._update(numbers.detach(), row_weights)
        scale = (self.variance + MIN_VARIANCE).rsqrt()
        return ((numbers - self.mean) * scale).clamp(-LARGEST, LARGEST)

    @torch.no_grad()
    def _update(self, numbers: Tensor, row_weights: Tensor | None) -> None:  # [B, W], [B]
        """Add the rows of a step, of all ranks, to the statistics. A collective."""
        weights = numbers.new_ones(len(numbers)) if row_weights is None else row_weights
        # In double precision: squares of numbers far from 0 cancel.
        centred = numbers.double() - self.mean
        moments = torch.cat([torch.ones_like(centred[:, :1]), centred, centred.square()], dim=1)
        totals = weights.double() @ moments  # [1 + 2 W]
        if self.process_group is not None:
            dist.all_reduce(totals, group=self.process_group)
        shift, square = (totals[1:] / totals[0].clamp(min=1)).chunk(2)
        has_rows = totals[0] > 0
        self.steps += has_rows
        share = has_rows / self.steps.double().clamp(1, STEPS)
        self.mean += share * shift
        around_new_mean = square - share * shift.square()
        self.variance += share * (around_new_mean - self.variance)


class PiecewiseLinear(nn.Module):
    """Numbers -> weights of the two nearest of evenly spaced knots, which add up to 1.

    A linear map of them is a piecewise linear function of each number (Gorishniy et al. 2022, arXiv
    2203.05556, section 3.2, with knots in place of quantiles). Numbers beyond the ends are clamped.
    """

    knots: Tensor

    def __init__(self, num_knots: int) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(*KNOT_RANGE, num_knots), persistent=False)

    def forward(self, numbers: Tensor) -> Tensor:  # [B, X] -> [B, X * knots]
        spacing = (KNOT_RANGE[1] - KNOT_RANGE[0]) / (len(self.knots) - 1)
        distances = numbers.clamp(*KNOT_RANGE).unsqueeze(2) - self.knots
        return (1 - distances.abs() / spacing).clamp(min=0).flatten(1)


class RowFeatures(nn.Module):
    """ID vectors, content vectors (or None: the ID-only baseline), numbers -> a vector [B, W]."""

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
        self.content_interest: ContentInterest | None = None
        if content is not None:
            self.content_interest = ContentInterest.from_settings(content, dimensions.num_parallel)
            width += 2 * content.dim
            numbers += self.content_interest.output_dim - content.dim
        self.piecewise: PiecewiseLinear | None = None
        if settings.number_knots:
            self.piecewise = PiecewiseLinear(settings.number_knots)
            width += dimensions.num_dense * settings.number_knots
        self.feature_dim = width + numbers
        self.standardization: Standardization | None = None
        if settings.standardize_numbers:
            self.standardization = Standardization(numbers, dimensions.process_group)

    def features(
        self,
        ids: IDVectors,
        content: ContentVectors | None,
        batch: Batch,
        interest: Tensor,  # [B, interest_dim]
        numbers: Tensor,  # [B, ...], `history_numbers` of the whole history
        history: JaggedHistory,  # the one attended to, over `batch.history.items`
        parallel: Tensor,  # [K, P]
    ) -> Tensor:  # [B, W]
        """Return all vectors and numbers of each row, concatenated. A collective."""
        content_vectors, blocks = [], [batch.dense_features, numbers]
        if self.content_interest is not None:
            assert content is not None
            interests = self.content_interest(content, history, parallel)
            dim = content.target.shape[1]
            content_vectors = [content.target, interests[:, :dim]]
            blocks.append(interests[:, dim:])
        if self.standardization is not None:  # in one call, so that ranks exchange one message
            widths = [block.shape[1] for block in blocks]
            joined = self.standardization(torch.cat(blocks, dim=1), batch.rows.loss_weights)
            blocks = list(joined.split(widths, dim=1))
        dense, numbers, *similarities = blocks
        if self.piecewise is not None:
            dense = torch.cat([dense, self.piecewise(dense)], dim=1)
        vectors = [dense, *ids.pooled, ids.target, interest, numbers]
        return torch.cat([*vectors, *content_vectors, *similarities], dim=1)


class AttendedFeatures(RowFeatures):
    """`RowFeatures` with DIN's target attention over all of the history."""

    def __init__(
        self,
        settings: AttendedSettings,
        dimensions: InputDimensions,
        content: ContentSettings | None,
    ) -> None:
        dim, units = dimensions.id_dim, settings.attention_units
        interest = TargetAttention(dim, dimensions.num_parallel, units)  # initialised first
        super().__init__(settings, dim, dimensions, content)
        self.interest = interest

    def attended(self, ids: IDVectors, content: ContentVectors | None, batch: Batch) -> Tensor:
        history = batch.history.jagged()
        id_history = history if ids.history_is_unique else history.unindexed()
        parallel = batch.history.values
        interest = self.interest(ids.target, ids.history, id_history, parallel)
        numbers = history_numbers(history, parallel)
        return self.features(ids, content, batch, interest, numbers, history, parallel)


class ExtraSequences(nn.Module):
    """`IDVectors` -> the same with vectors of extra sequences appended to the pooled ones.

    `widths` has each vector's width, by the sequence's name or `content of` its name, in order.
    """

    def __init__(
        self,
        settings: RankingSettings,
        dim: int,
        histories: list[HistoryColumns],
        content: ContentSettings | None,
    ) -> None:
        super().__init__()
        attended = settings if isinstance(settings, AttendedSettings) else AttendedSettings()
        is_mean = settings.further_histories == "mean"
        attention = partial(TargetAttention, units=attended.attention_units)
        encoder: Callable[[int, int], HistoryAttention] = MeanOfEvents if is_mean else attention
        self.encoders = nn.ModuleList(encoder(dim, len(sequence.numbers)) for sequence in histories)
        self.widths = {sequence.name: dim for sequence in histories}
        self.content_indices: list[int] = []
        self.content_encoders = nn.ModuleList()
        for index, sequence in enumerate(histories):
            if content is not None and sequence.name in content.history.columns:
                # Both are built, so that later parts' initial weights do not depend on the setting.
                interest = ContentInterest.from_settings(content, len(sequence.numbers))
                mean = MeanOfEvents(content.dim, len(sequence.numbers))
                self.content_indices.append(index)
                self.content_encoders.append(mean if is_mean else interest)
                width = content.dim if is_mean else interest.output_dim
                self.widths[f"content of {sequence.name}"] = width

    def forward(self, ids: IDVectors, content: ContentVectors | None, batch: Batch) -> IDVectors:
        """Append the vectors [B, width] of extra sequences. A collective with content."""
        histories = zip(self.encoders, ids.further, batch.history.extras, strict=True)
        encoded = [
            encode(ids.target, events, history.jagged(), history.values)
            for encode, events, history in histories
        ]
        for index, encode in zip(self.content_indices, self.content_encoders):
            assert content is not None
            history = batch.history.extras[index]
            vectors, jagged = history.content_of(content, batch.history.items.shape[0])
            if isinstance(encode, MeanOfEvents):
                items = vectors.read_history()[0]
                encoded.append(encode(vectors.target, items, jagged, history.values))
            else:
                encoded.append(encode(vectors, jagged, history.values))
        return replace(ids, pooled=[*ids.pooled, *encoded])
