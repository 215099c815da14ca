"""Batch: everything one training step needs, moved and pinned as one.

It is a superset of `torchrec.datasets.utils.Batch` (`dense_features`, `sparse_features`,
`labels`), so code that reads those keeps working. What is sharded gets its ids straight from an
attribute of the batch (`sparse_features`, `sequence_features`), which `TrainPipelineSparseDist`
needs to send them ahead of the step.

Shapes: B batch, N history items of the whole batch, U unique history items, E items to encode,
S items whose vectors are read from the bank, T tokens, F dense features, K sampled negatives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from embeddings import BankRoute
from recsys.data.jagged_history import JaggedHistory


@dataclass
class ContentInput:
    """One modality of the unique items.

    values: token ids int64 [U, T], pixels uint8 [U, 3, H, W] or features float32 [U, T, D].
    mask: bool [U, T], False where there is no token; [U, 1] for pixels. An item without this
        modality has no True.
    """

    values: Tensor
    mask: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> ContentInput:
        return self.map(lambda tensor: tensor.to(device=device, non_blocking=non_blocking))

    def map(self, function: Callable[[Tensor], Any]) -> ContentInput:
        """Return the same with `function` applied to each tensor."""
        return ContentInput(function(self.values), function(self.mask))

    def __getitem__(self, items: slice) -> ContentInput:
        return ContentInput(self.values[items], self.mask[items])


@dataclass
class ItemExchange:
    """Which of its item vectors a rank sends to each rank, and how many it receives from each.

    rows: int64, of the vectors at hand, those for rank 0 first, `send_counts` for each rank.
    """

    rows: Tensor
    send_counts: list[int]
    receive_counts: list[int]


@dataclass
class Batch(Pipelineable):
    """The impressions of one step on one rank and the content of their items.

    sparse_features: ids of the pooled tables; None when there are none.
    sequence_features: ids of the target item (length 1 each) and of the history: either the unique
        ones, `history_items`, whose lengths by row have no meaning, or all of them.
    history_items: unique items of the histories [U]; `history_index` [N] points into them.
    history_lengths: int64 [B], summing to N, the longest of them `longest_history`;
        `history_values` float32 [N, P] the parallel lists.
    content_items: unique items that this rank encodes [E], `content` what they contain.
    target_index: [B], which of the item vectors at hand (`ContentBranch.item_vectors`) is ranked.
    history_content_index: [U], where the history's items are among them, if they are encoded too;
        else empty.
    with_gradient: how many of the items to encode are encoded with gradient, the first ones; None
        for all.
    bank_items: items that are ranked but read from the bank instead [S].
    bank_reads: how rows of the bank come here, for `read_items`; `bank_writes` how those of
        `content_items` go there. None: found in the step.
    exchange: how item vectors go from the ranks that own them to those that need them; None where
        each rank encodes its own.
    row_positions: place of each row in its files [B], -1 for a row that only pads.
    extra: float32 [B, X], the columns of kind extra in the order of the schema, NaN where a row has
        no value; None where there are none, or no labels either.
    negative_items: items drawn as negatives of retrieval [K], also a feature of
        `sequence_features`; `negative_log_q` [K] and `target_log_q` [B] the log of the probability
        with which they, and the ranked items, are drawn.
    """

    dense_features: Tensor  # [B, F]
    sparse_features: KeyedJaggedTensor | None
    labels: Tensor  # [B, number of labels]
    sequence_features: KeyedJaggedTensor
    target_items: Tensor  # [B]
    groups: Tensor  # [B]
    row_positions: Tensor  # [B]
    history_lengths: Tensor  # [B]
    history_values: Tensor  # [N, P]
    history_items: Tensor  # [U]
    history_index: Tensor  # [N]
    content_items: Tensor  # [E]
    target_index: Tensor  # [B]
    history_content_index: Tensor  # [U] or [0]
    bank_items: Tensor  # [S]
    content: dict[str, ContentInput] = field(default_factory=dict)
    longest_history: int = 0
    with_gradient: int | None = None
    bank_reads: BankRoute | None = None
    bank_writes: BankRoute | None = None
    exchange: ItemExchange | None = None
    extra: Tensor | None = None
    negative_items: Tensor | None = None
    negative_log_q: Tensor | None = None
    target_log_q: Tensor | None = None

    def _map(self, function: Callable[[Any], Any]) -> Batch:
        """Return a batch with `function` applied to every tensor and KeyedJaggedTensor."""
        changed: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "content":
                changed["content"] = {name: part.map(function) for name, part in value.items()}
            elif isinstance(value, ItemExchange):
                changed[item.name] = replace(value, rows=function(value.rows))
            elif isinstance(value, BankRoute):
                order, rows = function(value.order), function(value.rows)
                changed[item.name] = replace(value, order=order, rows=rows)
            elif isinstance(value, Tensor | KeyedJaggedTensor):
                changed[item.name] = function(value)
        return replace(self, **changed)

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return self._map(lambda tensor: tensor.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: Any) -> None:
        self._map(lambda tensor: tensor.record_stream(stream))

    def jagged_history(self) -> JaggedHistory:
        """Return the histories as an index into `history_items`."""
        return JaggedHistory.of(
            self.history_index,
            self.history_lengths,
            len(self.history_items),
            self.longest_history,
        )

    @property
    def read_items(self) -> Tensor:
        """Items whose vectors come from the bank: those to rank, the histories', the negatives."""
        items = [self.bank_items, self.history_items]
        return torch.cat(items if self.negative_items is None else [*items, self.negative_items])

    @property
    def row_weights(self) -> Tensor:
        """Weight of each row in the losses: 1, and 0 for a row that only pads; float32 [B]."""
        return (self.row_positions >= 0).float()

    @property
    def batch_size(self) -> int:
        return self.labels.shape[0]
