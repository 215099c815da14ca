"""Batch: everything one training step needs, moved and pinned as one object.

Shapes: B batch, N history items of the whole batch, U unique history items, E items to encode,
S items whose vectors are read from the bank, T tokens, F dense features, P parallel lists,
X columns of kind extra, K sampled negatives, C labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from embeddings.memory_bank import BankRoute
from recsys.data.items.kind import ContentInput as ContentInput
from recsys.data.jagged_history import JaggedHistory

Content = TypeVar("Content")
Part = TypeVar("Part")


@dataclass
class ItemExchange:
    """Routes of item vectors; `rows` int64 [sum of send_counts] are grouped by receiving rank."""

    rows: Tensor
    send_counts: list[int]
    receive_counts: list[int]


@dataclass
class FurtherHistory:
    """The events of a sequence after the first one, without their ids.

    lengths: int64 [B], summing to N.
    values: float32 [N, P], the lists of floats beside it.
    longest: maximum of `lengths`.
    content_index: int64 [N], positions in `Batch.history_items` if content is read; else empty.
    """

    lengths: Tensor
    values: Tensor
    longest: int
    content_index: Tensor

    def content_of(self, content: Content, num_items: int) -> tuple[Content, JaggedHistory]:
        """Return the content vectors of a batch, and the history as an index into its U items."""
        index = self.content_index
        return content, JaggedHistory.of(index, self.lengths, num_items, self.longest)

    def jagged(self) -> JaggedHistory:
        index = torch.arange(len(self.values), device=self.lengths.device)
        return JaggedHistory.of(index, self.lengths, len(index), self.longest)


@dataclass
class Batch(Pipelineable):
    """Impressions of one step on one rank, with the content of their items.

    It has the fields of `torchrec.datasets.utils.Batch`. `TrainPipelineSparseDist` needs sharded
    features as attributes of the batch, to send their ids ahead of the step.

    sparse_features: ids of the pooled tables; None when there are none.
    sequence_features: ids of the target item (length 1 each), of the history, of further histories
        and of lists of ids beside them. The history has all ids, or its unique ones.
    history_items: unique items of the histories whose content is read.
    history_values: the parallel lists; `unscaled_values` as recorded if a model standardised them.
    content_items: unique items that this rank encodes. `content` holds their content, or
        `content_vectors` their vectors in a pass without training.
    bank_rows: rows of `content_items` in the memory bank, -1 without one; None: the items are rows.
    target_items: rows of the ranked items. With a bounded vocabulary, `item_keys` are raw ids,
        and `has_row` is False for the row of unknown ids.
    target_index: row of each target item in the local item vectors (`ContentBranch.item_vectors`).
    history_content_index: likewise for the history items if they are encoded, else empty.
    with_gradient: number of `content_items`, the first, that are encoded with gradient; None: all.
    bank_items: ranked items whose vectors are read from the bank instead of encoded.
    bank_reads: route of the bank's rows for `read_items`; None: computed in the step.
    bank_writes: route of the rows of `content_items` to the bank; None: computed in the step.
    exchange: routes of item vectors between ranks; None if each rank encodes its own items.
    row_positions: position of each row in its files, -1 for a padding row.
    weights: the column of kind weight, 0 for a padding row. In training, the mean over the rows of
        all ranks is 1. None without such a column.
    label_weights: likewise by label, 0 where it is null; None if no label is nullable.
    extra: columns of kind extra, NaN where a row has no value; None without any, or without labels.
    further: the histories after the first one, in schema order.
    negative_items: sampled negatives of retrieval, also a feature of `sequence_features`.
    negative_log_q, target_log_q: log-probabilities of sampling the negatives and the ranked items.

    Example::

        import pyarrow as pa
        from recsys import Batch
        from recsys.data.batch_builder import BatchBuilder
        from recsys.data.parquet.values import ROW_POSITION
        from recsys.data.schema import Column, Schema

        columns = {"item": Column("id", num_embeddings=100), "liked": Column("label")}
        build = BatchBuilder(Schema("item", "item", columns), pooled_features=[])
        liked = pa.array([1, 0], pa.float32())
        rows = pa.table({"item": [7, 9], "liked": liked, ROW_POSITION: [0, 1]})
        batch: Batch = build(rows)
        batch.target_items  # [7, 9]
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
    content_vectors: Tensor | None = None  # [E, V]
    longest_history: int = 0  # maximum of history_lengths, which sum to N
    with_gradient: int | None = None
    bank_reads: BankRoute | None = None
    bank_writes: BankRoute | None = None
    exchange: ItemExchange | None = None
    weights: Tensor | None = None  # [B]
    label_weights: Tensor | None = None  # [B, C]
    extra: Tensor | None = None  # [B, X]
    further: list[FurtherHistory] = field(default_factory=list)
    bank_rows: Tensor | None = None  # [E]
    item_keys: Tensor | None = None  # [B]
    has_row: Tensor | None = None  # [B]
    negative_items: Tensor | None = None  # [K]
    negative_log_q: Tensor | None = None  # [K]
    target_log_q: Tensor | None = None  # [B]
    unscaled_values: Tensor | None = None  # [N, P]

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return _mapped(self, lambda tensor: tensor.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return _mapped(self, lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: Any) -> None:
        _mapped(self, lambda tensor: tensor.record_stream(stream))

    def jagged_history(self) -> JaggedHistory:
        return JaggedHistory.of(
            self.history_index, self.history_lengths, len(self.history_items), self.longest_history
        )

    @property
    def read_items(self) -> Tensor:
        """Items whose vectors are read from the bank [S + U + K]: ranked, history, negatives."""
        items = [self.bank_items, self.history_items]
        return torch.cat(items if self.negative_items is None else [*items, self.negative_items])

    @property
    def recorded_values(self) -> Tensor:
        """The parallel lists as they were recorded [N, P], whether standardised since or not."""
        return self.history_values if self.unscaled_values is None else self.unscaled_values

    @property
    def frequency_keys(self) -> Tensor:
        """Ranked items as their training rows are counted [B]: raw ids if those were not rows."""
        return self.target_items if self.item_keys is None else self.item_keys

    @property
    def bank_write_rows(self) -> Tensor:
        """Rows of the memory bank to which vectors of `content_items` are written [at most E]."""
        if self.bank_rows is None:
            return self.content_items
        return self.bank_rows[self.bank_rows >= 0]

    @property
    def contrastive_weights(self) -> Tensor:
        """Weight of each row in losses of an item's own ID vector [B]: 0 if it has none."""
        return self.row_weights if self.has_row is None else self.row_weights * self.has_row

    @property
    def row_weights(self) -> Tensor:
        """Weight of each row in the mean of a loss, 0 for a padding row; float32 [B]."""
        return (self.row_positions >= 0).float() if self.weights is None else self.weights

    @property
    def loss_weights(self) -> Tensor:
        """Weight of each row in the mean of each label's loss; float32 [B, C] or [B, 1]."""
        return self.row_weights.unsqueeze(1) if self.label_weights is None else self.label_weights

    @property
    def batch_size(self) -> int:
        return self.labels.shape[0]


def _mapped(part: Part, function: Callable[[Any], Any]) -> Part:
    if isinstance(part, Tensor | KeyedJaggedTensor):
        return function(part)
    if isinstance(part, dict):
        return {name: _mapped(value, function) for name, value in part.items()}  # type: ignore[return-value]
    if isinstance(part, list):
        return [_mapped(value, function) for value in part]  # type: ignore[return-value]
    if is_dataclass(part) and not isinstance(part, type):
        values = {item.name: _mapped(getattr(part, item.name), function) for item in fields(part)}
        return replace(part, **values)
    return part
