"""SIM: search each long history for items similar to the target, then attend to those.

As in Pi et al. 2020 (arXiv 2006.05639), a general search unit selects at most
`ranking.search_top_k` items of each history, and the exact search unit (`AgedAttention`) attends to
these alone. The search is soft, by similarity (the cosine of content as in MUSE, arXiv 2512.07216,
or the dot product of ID vectors without content), or hard, by category. It costs a dot product or a
comparison per history item and a sort; all later layers see only the selected items.

Shapes: B batch, N history items of the batch, K selected history items, D dimension, P parallel
lists, C labels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from recsys.config import ContentSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.data.jagged_history import JaggedHistory
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.layers.aged_attention import AgedAttention, age_of
from recsys.ranking.layers.attended_features import RowFeatures
from recsys.ranking.layers.content_interest import cosines
from recsys.ranking.layers.mlp import ranking_head
from recsys.ranking.sequence.times import TimeGaps
from recsys.ranking.settings import SimSettings
from recsys.ranking.vectors import IDVectors, MemberLogits


class Sim(RowFeatures):
    """ID vectors, content vectors and dense features -> one logit per label.

    An item's age is the time gap in the parallel list `ranking.time_gaps`; without such a list it
    is the number of newer items.

    Raises:
        ValueError: `ranking.time_gaps` names no parallel list.
    """

    Settings = SimSettings

    def __init__(
        self, settings: SimSettings, dimensions: InputDimensions, content: ContentSettings | None
    ) -> None:
        self.gaps = TimeGaps.of(settings.time_gaps, dimensions)
        dimensions = replace(dimensions, num_parallel=len(self.gaps.flags))
        interest = AgedAttention(dimensions.id_dim, dimensions.num_parallel, settings.search_heads)
        super().__init__(settings, dimensions.id_dim, dimensions, content)
        self.interest, self.top_k = interest, settings.search_top_k
        self.categories = dimensions.item_categories if settings.search == "category" else None
        self.mlp = ranking_head(self.feature_dim, settings, dimensions.num_labels)

    def forward(
        self, ids: IDVectors, content: ContentVectors | None, batch: Batch
    ) -> Tensor | MemberLogits:  # [B, C]
        """Return the logits of a batch, or the logits of each member of an ensemble in training."""
        history = batch.jagged_history()
        id_history = history if ids.history_is_unique else history.unindexed()
        found = self.search(ids, content, batch, history, id_history)
        ages = self._ages(batch, history)[found]
        parallel = batch.history_values[:, self.gaps.flags]
        numbers = self.history_numbers(history, parallel, batch)
        history, id_history, parallel = (
            history.select(found),
            id_history.select(found),
            parallel[found],
        )
        interest = self.interest(ids.target, ids.history, id_history, parallel, ages)
        return self.mlp(self.features(ids, content, batch, interest, numbers, history, parallel))

    @torch.no_grad()
    def search(
        self,
        ids: IDVectors,
        content: ContentVectors | None,
        batch: Batch,
        history: JaggedHistory,
        id_history: JaggedHistory,
    ) -> Tensor:  # [K]
        """Return the places of the history items most similar to each target, in rising order.

        This is SIM's general search unit. `history` indexes `batch.history_items`, `id_history`
        indexes `ids.history`.
        """
        if self.categories is not None:
            return self._in_category(batch, history)
        if content is None or self.content_interest is None:
            scores = id_history.dot(ids.target.float(), ids.history.float())
        else:
            scores = _content_similarity(content, history)
        return history.highest(scores, self.top_k)

    def _in_category(self, batch: Batch, history: JaggedHistory) -> Tensor:  # [K]
        """Return the latest positions whose item shares a category with the target."""
        assert self.categories is not None
        of_items = self.categories(batch.history_items)[history.index].unsqueeze(2)  # [N, C, 1]
        of_targets = self.categories(batch.target_items)[history.rows].unsqueeze(1)  # [N, 1, C]
        shared = (of_items == of_targets) & (of_targets >= 0)  # [N, C, C]
        return history.latest(shared.flatten(1).any(dim=1), self.top_k)

    def _ages(self, batch: Batch, history: JaggedHistory) -> Tensor:  # [N]
        if self.gaps.column is not None:
            return age_of(batch.recorded_values[:, self.gaps.column])
        return age_of(history.ages)


def _content_similarity(content: ContentVectors, history: JaggedHistory) -> Tensor:  # [N]
    """Return the cosine of target and history items, summed over content vectors and modalities."""
    items, modalities = content.read_history()
    spaces = zip(content.target_modalities.unbind(dim=1), modalities.unbind(dim=1))
    total = cosines(content.target, items, history)
    for target, of_items in spaces:
        total = total + cosines(target, of_items, history)
    return total
