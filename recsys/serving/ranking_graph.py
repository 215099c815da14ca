"""The ranking model of a run as one graph: vectors of a user and N candidates -> logits.

The scorer looks vectors up, so that tables and content vectors stay in mapped files. All candidates
have one history, so dense products replace the index of `JaggedHistory` over N * L positions. Every
operation can be traced by torch.export with N and L dynamic.

Shapes: N candidates, U history items, L positions per row (U, or fewer after a selection), K any
width, D dimension of ID vectors, E width of content vectors (D_content * (1 + M), as the memory
bank keeps them), F dense features, P parallel lists, C labels. Flat tensors [N * L] hold one row of
L positions after the other.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.content.vectors import ContentVectors
from recsys.content.wrap import unwrap
from recsys.data.batch import Rows, TargetItems
from recsys.model.precision import InBfloat16
from recsys.ranking.neighbours import Neighbours
from recsys.ranking.vectors import IDVectors


@dataclass
class SharedHistory:
    """The same history for each candidate; the methods are those of `JaggedHistory`."""

    num_rows: int  # N
    num_items: int  # U
    device: torch.device
    indices: Tensor | None = None  # int64 [N, L], the item at each position; None: all, in order
    is_searched: bool = False  # equal items must have equal scores, so that the later is found
    # Positions that `highest` has returned.
    _selected: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def longest(self) -> int:
        return self.num_items if self.indices is None else self.indices.shape[1]

    @property
    def lengths(self) -> Tensor:  # int64 [N]
        return torch.full((self.num_rows,), self.longest, device=self.device)

    @property
    def index(self) -> Tensor:  # int64 [N * L]
        if self.indices is None:
            return self.spread_items(torch.arange(self.num_items, device=self.device))
        return self.indices.reshape(-1)

    @property
    def rows(self) -> Tensor:  # int64 [N * L]
        return self.spread(torch.arange(self.num_rows, device=self.device).unsqueeze(1)).squeeze(1)

    @property
    def ages(self) -> Tensor:  # int64 [N * L]
        return self.spread_items(self.longest - 1 - torch.arange(self.longest, device=self.device))

    def spread_items(self, values: Tensor) -> Tensor:  # [L] -> [N * L]
        return values.unsqueeze(0).expand(self.num_rows, -1).reshape(-1)

    @property
    def is_shared(self) -> bool:
        """Whether all rows have the same positions: a selection differs between rows."""
        return self.indices is None

    def of_one_row(self, values: Tensor) -> Tensor:  # [N * L, K], equal in all rows -> [L, K]
        return values.view(self.num_rows, self.longest, values.shape[1])[0]

    def one_row(self) -> SharedHistory:
        return SharedHistory(1, self.num_items, self.device, self.indices)

    def unindexed(self) -> SharedHistory:
        return self

    def gather(self, items: Tensor) -> Tensor:  # [U, K] -> [N * L, K]
        if self.indices is None:
            return items.repeat(self.num_rows, 1)  # a copy, as callers add to the result in place
        return items.index_select(0, self.index)

    def spread(self, rows: Tensor) -> Tensor:  # [N, K] -> [N * L, K]
        spread = rows.unsqueeze(1).repeat(1, self.longest, 1)
        return spread.view(self.num_rows * self.longest, rows.shape[1])

    def sum(self, values: Tensor) -> Tensor:  # [N * L, K] -> [N, K]
        return self._by_row(values).sum(dim=1)

    def dot(self, queries: Tensor, items: Tensor) -> Tensor:  # [N, D], [U, D] -> [N * L]
        if self.is_searched:  # products in float32 may round equal items differently
            products = (queries.double() @ items.double().T).to(queries.dtype)
        else:
            products = queries @ items.T
        return (products if self.indices is None else products.gather(1, self.indices)).reshape(-1)

    def weighted_sum(self, weights: Tensor, items: Tensor) -> Tensor:  # [N * L], [U, D] -> [N, D]
        by_row = self._by_row(weights.unsqueeze(1)).squeeze(2)
        if self.indices is not None:
            empty = weights.new_zeros(self.num_rows, self.num_items)
            by_row = empty.scatter_add(1, self.indices, by_row)
        return by_row @ items

    def softmax(self, scores: Tensor) -> Tensor:  # [N * L] or [N * L, K], over positions of a row
        columns = scores if scores.dim() == 2 else scores.unsqueeze(1)
        return self._by_row(columns).softmax(dim=1).reshape(scores.shape)

    def maximum(self, values: Tensor, lowest: float) -> Tensor:  # [N * L, K] -> [N, K]
        floor = values.new_full((self.num_rows, 1, values.shape[1]), lowest)
        return torch.cat([floor, self._by_row(values)], dim=1).amax(dim=1)

    def padded(self, values: Tensor, fill: float) -> Tensor:  # [N * L] -> [N, L]; all count
        return self._by_row(values.unsqueeze(1)).squeeze(2)

    def highest(self, scores: Tensor, count: int) -> Tensor:
        """Return flat positions of a row's `count` highest scores [N * L]; the later wins a tie."""
        by_row = scores.reshape(self.num_rows, self.longest)
        order = self.longest - 1 - by_row.flip(1).argsort(dim=1, descending=True, stable=True)
        positions = order.narrow(1, 0, torch.sym_min(self.longest, count)).sort(dim=1).values
        first = torch.arange(self.num_rows, device=self.device).unsqueeze(1) * self.longest
        self._selected.append((positions + first).reshape(-1))
        return self._selected[-1]

    def select(self, positions: Tensor) -> SharedHistory:
        if not any(selected is positions for selected in self._selected):
            raise ValueError(
                "the model selects history items by their values, so rows keep different numbers "
                "of them, which a package cannot hold; select by JaggedHistory.highest"
            )
        items = self.index[positions].reshape(self.num_rows, -1)
        return replace(self, indices=items, _selected=[])

    def _by_row(self, values: Tensor) -> Tensor:  # [N * L, K] -> [N, L, K]
        return values.reshape(self.num_rows, self.longest, values.shape[1])


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
        return tuple(vars(self).values())


@dataclass
class SharedEvents:
    """Stand-in for an `ExtraHistory` whose events all candidates share."""

    values: Tensor  # [K, P], and [N * K, P] by `CandidateHistory.for_candidates`
    history: SharedHistory
    content: ContentVectors | None  # of the candidates and these events

    def jagged(self) -> SharedHistory:
        return self.history

    def content_of(
        self, content: ContentVectors, num_items: int
    ) -> tuple[ContentVectors | None, SharedHistory]:
        return self.content, self.history  # the batch's vectors are not read


@dataclass
class CandidateHistory:
    """Stand-in for a `History` that all candidates share."""

    values: Tensor  # [L, P], and [N * L, P] by `for_candidates`
    items: Tensor  # [L]
    history: SharedHistory
    extras: list[SharedEvents]
    unscaled_values: Tensor | None = None  # of the shape of `values`
    full: None = None  # full histories of several rows exist in training alone

    @property
    def recorded_values(self) -> Tensor:  # float32 [N * L, P], before scaling
        return self.values if self.unscaled_values is None else self.unscaled_values

    def jagged(self) -> SharedHistory:
        return self.history

    def for_candidates(self, positions: Tensor | None) -> CandidateHistory:
        """Return the history with the lists of each candidate, of selected positions if given."""

        def spread(values: Tensor) -> Tensor:  # [L, P] -> [N * L, P]
            repeated = self.history.gather(values)
            return repeated if positions is None else repeated[positions]

        return replace(
            self,
            values=spread(self.values),
            history=self.history if positions is None else self.history.select(positions),
            extras=[replace(seq, values=seq.history.gather(seq.values)) for seq in self.extras],
            unscaled_values=None if self.unscaled_values is None else spread(self.unscaled_values),
        )


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


@runtime_checkable
class Packaged(Protocol):
    """A layer that computes faster where its weights are constant, or in bfloat16."""

    def packaged(self, bfloat16: bool) -> nn.Module: ...


def packaged(model: nn.Module, bfloat16: bool) -> nn.Module:
    """Return a model with the layers of a package; it shares other layers with `model`.

    With `bfloat16`, regions of autocast are removed: packaged layers compute in bfloat16 instead.
    """
    if isinstance(model, Packaged):
        return model.packaged(bfloat16)
    children = {
        name: None if child is None else packaged(child, bfloat16)
        for name, child in model._modules.items()
    }
    has_region = bfloat16 and isinstance(model, InBfloat16)
    if not has_region and all(children[name] is child for name, child in model._modules.items()):
        return model
    copied = copy.copy(model)
    copied._modules = children
    if has_region:
        unwrap(copied, InBfloat16)
    return copied


class RankingGraph(nn.Module):
    """History map and ranking model over the candidates of one user, in evaluation mode.

    `content_dim` is the width of a content vector (0: none). `top_k` is the number of history items
    that a search keeps (0: all). `scaling` standardises numbers. With `bfloat16`, layers whose
    products dominate compute in it, and all others in float32.
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
        bfloat16: bool = False,
    ) -> None:
        super().__init__()
        self.neighbours, self.scaling = neighbours, scaling
        self.further_histories = further_histories and packaged(further_histories, bfloat16)
        self.ranking, self.history_map = packaged(ranking, bfloat16), history_map
        self.content_dim, self.top_k = content_dim, top_k
        self.eval()

    def forward(self, *arguments: Any) -> Tensor:  # [N, C]
        inputs = RankingInputs(*arguments)
        num_rows, num_items = inputs.target.shape[0], inputs.history.shape[0]
        is_searched = self.top_k > 0 or hasattr(self.ranking, "search")
        device = inputs.target.device
        shared = SharedHistory(num_rows, num_items, device, is_searched=is_searched)
        events = [
            self._shared_events(inputs.target_content, *event_inputs)
            for event_inputs in zip(inputs.further_parallel, inputs.further_content, strict=True)
        ]
        history = CandidateHistory(inputs.parallel, inputs.history_items, shared, events)
        batch = CandidateBatch(inputs.dense, TargetItems(inputs.target_items), history)
        if self.scaling is not None:
            batch = self.scaling(batch)
        positions = None
        if self.top_k:
            queries, items = F.normalize(inputs.target_in_bank), F.normalize(inputs.history_content)
            positions = shared.highest(shared.dot(queries, items), self.top_k)
        batch = replace(batch, history=batch.history.for_candidates(positions))
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
        modalities = [vectors[:, dim:].unflatten(1, (-1, dim)) for vectors in (target, history)]
        mapped = self.history_map(history[:, :dim])
        return ContentVectors(target[:, :dim], mapped, modalities[0], modalities[1])

    def _shared_events(
        self, target: Tensor, parallel: Tensor, content: Tensor
    ) -> SharedEvents:  # [N, E], [K, P], [K, E] or [K, 0]
        shared = SharedHistory(target.shape[0], parallel.shape[0], parallel.device)
        vectors = self._content(target, content) if content.shape[1] else None
        return SharedEvents(parallel, shared, vectors)
