"""Content interest over the rows of a bank, with a history map that is trained, to be timed.

Shapes: B rows, U unique history items, N history items, D dimension, M modalities.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys.config import HistorySettings
from recsys.content.history_map import HistoryMap
from recsys.content.vectors import ContentVectors, StoredHistory
from recsys.data.jagged_history import JaggedHistory
from recsys.ranking.layers.content_interest import ContentInterest


class StoredContentInterest(nn.Module):
    """History map, attention and, with modalities, the similarities of a history in a bank."""

    def __init__(self, dim: int, num_modalities: int) -> None:
        """Build the map and the interest; without modalities, without similarities."""
        super().__init__()
        settings = HistorySettings(similarity_features=num_modalities > 0)
        self.map = HistoryMap(dim, settings)
        self.interest = ContentInterest(dim, num_modalities, 1, settings)

    def forward(
        self,
        target: Tensor,  # [B, D]
        modalities: Tensor,  # [B, M, D]
        rows: Tensor,  # [U, D + M * D]
        history: JaggedHistory,
        parallel: Tensor,  # [N, 1]
    ) -> Tensor:
        """Return the interest with its features."""
        dim, num_modalities = target.shape[1], modalities.shape[1]

        def read() -> tuple[Tensor, Tensor]:
            of_modalities = rows[:, dim:].reshape(len(rows), num_modalities, dim)
            return self.map(rows[:, :dim]), of_modalities

        content = ContentVectors(
            target,
            None,
            modalities,
            None,
            read=read,
            read_stored=lambda: StoredHistory(rows, self.map.matrix()),
        )
        interest: Tensor = self.interest(content, history, parallel)
        return interest


def content_inputs(
    rows: int, dim: int, num_modalities: int, history: JaggedHistory
) -> tuple[Tensor, Tensor, Tensor, JaggedHistory, Tensor]:
    """Return random inputs of `StoredContentInterest`."""
    target = torch.randn(rows, dim, requires_grad=True)
    modalities = torch.randn(rows, num_modalities, dim, requires_grad=True)
    stored = torch.randn(history.num_items, (1 + num_modalities) * dim + 1)[:, :-1]
    return target, modalities, stored, history, torch.rand(len(history.index), 1).round()
