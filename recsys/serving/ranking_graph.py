"""The ranking model of a run as one graph: vectors of a user and N candidates -> logits.

The scorer looks vectors up, so that tables and content vectors stay in mapped files.
Shapes: N candidates, L history items, D dimension of ID vectors, E width of content vectors
(D_content * (1 + M), as the memory bank keeps them), F dense features, P parallel lists, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.content.vectors import ContentVectors
from recsys.data.batch import Rows, TargetItems
from recsys.ranking.neighbours import Neighbours
from recsys.ranking.vectors import IDVectors
from recsys.serving.shared_history import SharedHistory


@dataclass
class RankingInputs:
    """Inputs of the graph, in the order of its arguments."""

    pooled: list[Tensor]  # one [N, D_table] per pooled feature
    dense: Tensor  # [N, F]
    target: Tensor  # [N, D]
    history: Tensor  # [L, D]
    parallel: Tensor  # [L, P]
    target_items: Tensor  # int64 [N]
    history_items: Tensor  # int64 [L]
    target_content: Tensor  # [N, E], E = 0 without content
    history_content: Tensor  # [L, E]
    target_in_bank: Tensor  # [N, E] of the memory bank to search by; [N, 0] without a search
    # One per further history of K events; [K, 0] if its content is not read.
    further: list[Tensor] = field(default_factory=list)  # [K, D]
    further_parallel: list[Tensor] = field(default_factory=list)  # [K, P]
    further_content: list[Tensor] = field(default_factory=list)  # [K, E]

    def arguments(self) -> tuple[object, ...]:
        """Return the graph's arguments; the last three only with further histories."""
        arguments = tuple(vars(self).values())
        return arguments if self.further else arguments[:-3]


@dataclass
class SharedEvents:
    """Stand-in for a `FurtherHistory` whose events all candidates share."""

    values: Tensor  # [N * K, P]
    history: SharedHistory
    content: ContentVectors | None  # of the candidates and these events

    def jagged(self) -> SharedHistory:
        return self.history

    def content_of(
        self, content: ContentVectors, num_items: int
    ) -> tuple[ContentVectors | None, SharedHistory]:
        """Return the content vectors of these events; the batch's are not read."""
        return self.content, self.history


@dataclass
class CandidateHistory:
    """Stand-in for a `History` that all candidates share."""

    values: Tensor  # [N * L, P]
    items: Tensor  # [L]
    history: SharedHistory
    further: list[SharedEvents]
    unscaled_values: Tensor | None = None  # [N * L, P]

    @property
    def recorded_values(self) -> Tensor:
        """The parallel lists before scaling: float32 [N * L, P]."""
        return self.values if self.unscaled_values is None else self.unscaled_values

    def jagged(self) -> SharedHistory:
        return self.history


@dataclass
class CandidateBatch:
    """Stand-in for a `Batch`: the fields that ranking models read, for candidates of one user."""

    dense_features: Tensor  # [N, F]
    target: TargetItems
    history: CandidateHistory

    @property
    def rows(self) -> Rows:
        """Rows of one group, none of which is padding."""
        zeros = torch.zeros_like(self.target.items)
        return Rows(zeros, zeros)


class RankingGraph(nn.Module):
    """History map and ranking model over the candidates of one user, in evaluation mode.

    `content_dim` is the width of a content vector (0: none). `top_k` is the number of history items
    that a search keeps (0: all). `scaling` standardises numbers. `neighbours` is
    of `recsys.ranking.neighbours`.
    """

    def __init__(
        self,
        ranking: nn.Module,
        history_map: nn.Module | None = None,
        content_dim: int = 0,
        top_k: int = 0,
        further_histories: nn.Module | None = None,
        scaling: nn.Module | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.further_histories, self.scaling = further_histories, scaling
        self.ranking, self.history_map = ranking, history_map
        self.content_dim, self.top_k = content_dim, top_k
        self.eval()

    def forward(self, *arguments: Any) -> Tensor:  # [N, C]
        inputs = RankingInputs(*arguments)
        shared = SharedHistory(
            inputs.target.shape[0], inputs.history.shape[0], inputs.target.device
        )
        values = shared.gather(inputs.parallel)
        if self.top_k:
            queries, items = F.normalize(inputs.target_in_bank), F.normalize(inputs.history_content)
            places = shared.highest(shared.dot(queries, items), self.top_k)
            shared, values = shared.select(places), values[places]
        events = [
            self._shared_events(inputs.target_content, *parts)
            for parts in zip(inputs.further_parallel, inputs.further_content, strict=True)
        ]
        history = CandidateHistory(values, inputs.history_items, shared, events)
        batch = CandidateBatch(inputs.dense, TargetItems(inputs.target_items), history)
        if self.scaling is not None:
            batch = self.scaling(batch)
        ids = IDVectors(inputs.pooled, inputs.target, inputs.history, further=inputs.further)
        content = self._content(inputs.target_content, inputs.history_content)
        if self.further_histories is not None:
            ids = self.further_histories(ids, content, batch)
        if self.neighbours is None:
            scored = self.ranking(ids, content, batch)
        else:
            evidence = self.neighbours(content, batch)
            scored = self.neighbours.blend(self.ranking(ids, content, evidence.batch), evidence)
        return (scored if isinstance(scored, Tensor) else scored.logits).float()

    def _content(self, target: Tensor, history: Tensor) -> ContentVectors | None:  # [N, E], [L, E]
        if self.history_map is None:
            return None
        dim = self.content_dim
        modalities = [part[:, dim:].unflatten(1, (-1, dim)) for part in (target, history)]
        mapped = self.history_map(history[:, :dim])
        return ContentVectors(target[:, :dim], mapped, modalities[0], modalities[1])

    def _shared_events(
        self, target: Tensor, parallel: Tensor, content: Tensor
    ) -> SharedEvents:  # [N, E], [K, P], [K, E] or [K, 0]
        shared = SharedHistory(target.shape[0], parallel.shape[0], parallel.device)
        vectors = self._content(target, content) if content.shape[1] else None
        return SharedEvents(shared.gather(parallel), shared, vectors)
