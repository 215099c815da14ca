"""Sequences after the first, each encoded into one vector that ranking models read as pooled.

Shapes: B batch, N events of a history in the whole batch, D dimension, P parallel lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from recsys.config import ContentSettings, RankingSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.data.jagged_history import JaggedHistory
from recsys.data.schema_columns import HistoryColumns
from recsys.ranking.layers.content_interest import ContentInterest
from recsys.ranking.layers.target_attention import HistoryAttention, TargetAttention
from recsys.ranking.settings import AttendedSettings
from recsys.ranking.vectors import IDVectors


class MeanOfEvents(HistoryAttention):
    """The mean of the events: attention with equal scores, which does not depend on the target."""

    def scores(
        self, target: Tensor, items: Tensor, history: JaggedHistory, parallel: Tensor
    ) -> Tensor:  # [B, D], [N, D], [N, P] -> [N]
        return torch.zeros_like(history.rows, dtype=items.dtype)


class ExtraSequences(nn.Module):
    """`IDVectors` -> the same with the vectors of extra sequences behind the pooled ones.

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
        kind: Callable[[int, int], HistoryAttention] = MeanOfEvents if is_mean else attention
        self.encoders = nn.ModuleList(kind(dim, len(sequence.numbers)) for sequence in histories)
        self.widths = {sequence.name: dim for sequence in histories}
        self.content_places: list[int] = []
        self.content_encoders = nn.ModuleList()
        for place, sequence in enumerate(histories):
            if content is not None and sequence.name in content.history.columns:
                interest = ContentInterest.of(content, len(sequence.numbers))
                mean = MeanOfEvents(content.dim, len(sequence.numbers))
                self.content_places.append(place)
                self.content_encoders.append(mean if is_mean else interest)
                width = content.dim if is_mean else interest.output_dim
                self.widths[f"content of {sequence.name}"] = width

    def forward(self, ids: IDVectors, content: ContentVectors | None, batch: Batch) -> IDVectors:
        """Append the vectors [B, width] of extra sequences. A collective with content."""
        encoded = [
            encode(ids.target, events, history.jagged(), history.values)
            for encode, events, history in zip(
                self.encoders, ids.further, batch.history.further, strict=True
            )
        ]
        for place, encode in zip(self.content_places, self.content_encoders):
            assert content is not None
            history = batch.history.further[place]
            vectors, jagged = history.content_of(content, batch.history.items.shape[0])
            if isinstance(encode, MeanOfEvents):
                items = vectors.read_history()[0]
                encoded.append(encode(vectors.target, items, jagged, history.values))
            else:
                encoded.append(encode(vectors, jagged, history.values))
        return replace(ids, pooled=[*ids.pooled, *encoded])
