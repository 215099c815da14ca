"""SIM: long histories are searched for what is like the target, then attended to.

After Pi et al. 2020 (arXiv 2006.05639): a general search unit finds at most `ranking.search_top_k`
items of each history, the exact search unit (`AgedAttention`) attends to these alone. The search is
soft, by similarity (the cosine of content as in MUSE, arXiv 2512.07216, or the dot product of ID
vectors where there is no content), or hard, by category. It costs a dot product or a comparison
per history item and a sort; all that follows sees what was found.

Shapes: B batch, N history items of the batch, K of them found, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from recsys.config import ContentSettings
from recsys.config.limits import PositiveInt
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.data.jagged_history import JaggedHistory
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.layers.aged_attention import AgedAttention, age_of
from recsys.ranking.layers.attended_features import NumbersSettings, RowFeatures
from recsys.ranking.layers.content_interest import cosines
from recsys.ranking.layers.history_numbers import history_numbers
from recsys.ranking.layers.mlp import HeadSettings, ranking_head
from recsys.ranking.vectors import IDVectors, MemberLogits


@dataclass
class SimSettings(NumbersSettings, HeadSettings):
    """Settings of SIM."""

    name: str = "sim"
    search: Literal["similarity", "category"] = "similarity"
    """Attend to what is most like the target, by content (by ID vectors where there is none), or to
    the latest items of its category."""
    search_top_k: PositiveInt = 50
    """Items of each history that are attended to, at most."""
    search_heads: PositiveInt = 2
    """Heads of the attention to them."""
    category: str | None = None
    """The item column of kind category, for search by category."""
    time_gaps: str | None = None
    """The parallel list with each item's age; default: its place."""


class Sim(RowFeatures):
    """ID vectors, content vectors and dense features -> one logit per label.

    An item's age is the time gap in the parallel list `ranking.time_gaps`, or, without one, how
    many items came after it.

    Raises:
        ValueError: `ranking.time_gaps` names no parallel list.
    """

    Settings = SimSettings
    categories: Tensor | None

    def __init__(
        self,
        settings: SimSettings,
        dimensions: InputDimensions,
        content: ContentSettings | None,
    ) -> None:
        names, gaps = dimensions.parallel_names, settings.time_gaps
        if gaps is not None and gaps not in names:
            raise ValueError(
                f"ranking.time_gaps is '{gaps}'; the parallel lists of the history in schema.yaml "
                f"are {list(names)}"
            )
        self.gap_column = None if gaps is None else names.index(gaps)
        self.flag_columns = [
            column for column in range(dimensions.num_parallel) if column != self.gap_column
        ]
        # A gap is an item's age and nothing else: seconds have no place among flags.
        dimensions = replace(dimensions, num_parallel=len(self.flag_columns))
        interest = AgedAttention(dimensions.id_dim, dimensions.num_parallel, settings.search_heads)
        super().__init__(settings, dimensions.id_dim, dimensions, content)
        self.interest, self.top_k = interest, settings.search_top_k
        categories = dimensions.item_categories if settings.search == "category" else None
        self.register_buffer("categories", categories, persistent=False)
        self.mlp = ranking_head(self.feature_dim, settings, dimensions.num_labels)

    def forward(
        self, ids: IDVectors, content: ContentVectors | None, batch: Batch
    ) -> Tensor | MemberLogits:  # [B, C]
        history = batch.jagged_history()
        id_history = history if ids.history_is_unique else history.unindexed()
        found = self.search(ids, content, batch, history, id_history)
        ages = self._ages(batch, history)[found]
        parallel = batch.history_values[:, self.flag_columns]
        numbers = history_numbers(history, parallel)
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
    ) -> Tensor:  # [K], places in the histories, rising
        """The general search unit: what of each history is like its target."""
        if self.categories is not None:
            return self._in_category(batch, history)
        if content is None or self.content_interest is None:
            scores = id_history.dot(ids.target.float(), ids.history.float())
        else:
            scores = _content_similarity(content, history)
        return history.highest(scores, self.top_k)

    def _in_category(self, batch: Batch, history: JaggedHistory) -> Tensor:
        """The latest places whose item has the target's category; none where it has none."""
        assert self.categories is not None
        of_items = self.categories[batch.history_items][history.index]
        of_targets = self.categories[batch.target_items][history.rows]
        same = ((of_items == of_targets) & (of_targets >= 0)).nonzero().squeeze(1)
        # Of equal scores the later ones are taken.
        latest = history.select(same).highest(torch.zeros_like(same), self.top_k)
        return same[latest]

    def _ages(self, batch: Batch, history: JaggedHistory) -> Tensor:  # [N]
        if self.gap_column is not None:
            return age_of(batch.history_values[:, self.gap_column])
        return age_of(history.ages)


def _content_similarity(content: ContentVectors, history: JaggedHistory) -> Tensor:  # [N]
    """The cosine of target and history, summed over content vectors and modalities."""
    items, modalities = content.read_history()
    spaces = zip(content.target_modalities.unbind(dim=1), modalities.unbind(dim=1))
    total = cosines(content.target, items, history)
    for target, of_items in spaces:
        total = total + cosines(target, of_items, history)
    return total
