"""Histories after the first, each encoded into one vector that ranking models read as pooled.

A model of clicks may also read purchases or searches. Backbones attend to the first sequence of the
schema; each further one becomes a vector [B, D] behind the pooled ID features, whatever the
backbone, by the target attention of DIN or as the mean of its events. Lists of floats beside it are
mapped and added, as in `HistoryAttention`. An empty history is a vector of zeros.

Shapes: B batch, N events of a history in the whole batch, D dimension, P parallel lists.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from recsys.config import RankingSettings
from recsys.data.batch import Batch
from recsys.data.jagged_history import JaggedHistory
from recsys.ranking.layers.target_attention import HistoryAttention, TargetAttention
from recsys.ranking.settings import AttendedSettings
from recsys.ranking.vectors import IDVectors


class MeanOfEvents(HistoryAttention):
    """The mean of the events: attention with equal scores, which does not depend on the target."""

    def scores(
        self,
        target: Tensor,  # [B, D]
        items: Tensor,  # [N, D]
        history: JaggedHistory,
        parallel: Tensor,  # [N, P]
    ) -> Tensor:  # [N]
        """Return zeros."""
        return torch.zeros_like(history.rows, dtype=items.dtype)


class FurtherHistories(nn.Module):
    """`IDVectors` -> the same with one vector per further history behind the pooled ones.

    Args:
        settings: `further_histories`, and `attention_units` of models that have them.
        dim: D.
        num_parallel: P of each further history.

    Example::

        FurtherHistories(RankingSettings(), 16, [1])  # purchases with their prices
    """

    def __init__(self, settings: RankingSettings, dim: int, num_parallel: list[int]) -> None:
        """Build an encoder for each history."""
        super().__init__()
        attended = settings if isinstance(settings, AttendedSettings) else AttendedSettings()
        is_mean = settings.further_histories == "mean"
        self.encoders = nn.ModuleList(
            MeanOfEvents(dim, number)
            if is_mean
            else TargetAttention(dim, number, attended.attention_units)
            for number in num_parallel
        )

    def forward(self, ids: IDVectors, batch: Batch) -> IDVectors:
        """Return the vectors with those of the further histories, each [B, D]."""
        encoded = [
            encode(ids.target, events, history.jagged(), history.values)
            for encode, events, history in zip(
                self.encoders, ids.further, batch.further, strict=True
            )
        ]
        return replace(ids, pooled=[*ids.pooled, *encoded])
