"""Batch: everything one training step needs, moved and pinned as one object.

Shapes: B batch, N history items of the whole batch, U unique history items, E items to encode, C
labels, or items that run through trained encoders, F dense features, P parallel lists, W full
histories, T their items, X columns of kind extra, K sampled negatives, V width of a content vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from embeddings.memory_bank import BankRoute
from recsys.data.items.kind import ContentInput as ContentInput
from recsys.data.jagged_history import JaggedHistory

Content = TypeVar("Content")
Node = TypeVar("Node")


@dataclass
class Rows:
    """The rows of a batch, without their features."""

    positions: Tensor  # int64 [B], index of each row in its split; -1 for a padding row
    groups: Tensor  # int64 [B]
    weights: Tensor | None = None  # [B], the column of kind weight; mean 1 over ranks in training
    label_weights: Tensor | None = None  # [B, C], 0 for a null label; None: no label may be null
    extra: Tensor | None = None  # [B, X], NaN for a missing value

    @property
    def loss_weights(self) -> Tensor:
        """Weight of each row in the mean of a loss, 0 for a padding row; float32 [B]."""
        return (self.positions >= 0).float() if self.weights is None else self.weights

    @property
    def label_loss_weights(self) -> Tensor:
        """Weight of each row in the mean of each label's loss; float32 [B, C] or [B, 1]."""
        return self.loss_weights.unsqueeze(1) if self.label_weights is None else self.label_weights


@dataclass
class TargetItems:
    """The ranked item of each row."""

    items: Tensor  # int64 [B], rows of the item table
    keys: Tensor | None = None  # int64 [B], raw ids with a bounded vocabulary
    has_row: Tensor | None = None  # bool [B], False for the row of unknown ids of that vocabulary
    log_q: Tensor | None = None  # [B], log-probability that retrieval samples the item

    @property
    def frequency_keys(self) -> Tensor:
        """Keys of the ranked items in `ItemCounts` [B]: raw ids with a bounded vocabulary."""
        return self.items if self.keys is None else self.keys


@dataclass
class ExtraHistory:
    """The events of an extra sequence (not the first), without their ids."""

    lengths: Tensor  # int64 [B], summing to N
    values: Tensor  # float32 [N, P], the parallel lists of floats
    longest: int  # maximum of `lengths`
    index: Tensor  # int64 [N], positions in `History.items` if content is read; else empty

    def content_of(self, content: Content, num_items: int) -> tuple[Content, JaggedHistory]:
        """Return `content` unchanged, and the history as an index into its `num_items` items."""
        return content, JaggedHistory.of(self.index, self.lengths, num_items, self.longest)

    def jagged(self) -> JaggedHistory:
        index = torch.arange(len(self.values), device=self.lengths.device)
        return JaggedHistory.of(index, self.lengths, len(index), self.longest)


@dataclass
class FullHistories:
    """W full histories with T items, of which the batch's histories are prefixes."""

    index: Tensor  # int64 [T], positions in `History.items`
    lengths: Tensor  # int64 [W]
    positions: Tensor  # int64 [N], position among T of each item of the batch's histories
    rows: Tensor  # int64 [B], index of each target's full history
    longest: int  # maximum of `lengths`
    host_lengths: np.ndarray  # copy of `lengths` that stays on the host

    def among(self, items: np.ndarray) -> FullHistories:  # int64 [U], ascending
        """Return a copy in which `index` holds positions in `items` instead of ids."""
        return replace(self, index=torch.searchsorted(torch.from_numpy(items), self.index))

    def jagged(self, num_items: int) -> JaggedHistory:
        return JaggedHistory.of(
            self.index, self.lengths, num_items, self.longest, self.host_lengths
        )


@dataclass
class History:
    """The events of the first sequence, and the extra sequences in schema order."""

    lengths: Tensor  # int64 [B], summing to N
    values: Tensor  # float32 [N, P], the parallel lists, standardised for some models
    longest: int  # maximum of `lengths`
    index: Tensor  # int64 [N], positions in `items`
    items: Tensor  # int64 [U], unique items of the histories whose content is read
    unscaled_values: Tensor | None = None  # [N, P], as recorded, if a model standardised them
    host_lengths: np.ndarray | None = None  # copy of `lengths` that stays on the host
    extras: list[ExtraHistory] = field(default_factory=list)
    full: FullHistories | None = None  # set if rows yield several targets (`all_positions`)

    @property
    def recorded_values(self) -> Tensor:
        """The parallel lists as recorded [N, P], before any standardisation."""
        return self.values if self.unscaled_values is None else self.unscaled_values

    def jagged(self) -> JaggedHistory:
        return JaggedHistory.of(
            self.index, self.lengths, len(self.items), self.longest, self.host_lengths
        )


@dataclass
class EncodedItems:
    """The items for which trained encoders run if `encoder_share` is below 1."""

    positions: Tensor  # int64 [C], ascending positions among the E items
    reads: BankRoute | None = None  # route of the E items' last outputs
    writes: BankRoute | None = None  # route of the C new outputs


@dataclass
class BatchContent:
    """Items whose content this rank encodes, and where their vectors go."""

    items: Tensor  # int64 [E], unique; the first `with_gradient` are encoded with gradient
    target_index: Tensor  # int64 [B], row of each ranked item in the rank's item vectors
    history_index: Tensor  # int64 [U], same for history items if they are encoded; else empty
    inputs: dict[str, ContentInput] = field(default_factory=dict)  # by modality
    vectors: Tensor | None = None  # [E, V], replaces `inputs` in a pass without training
    with_gradient: int | None = None  # None: all
    negative_index: Tensor | None = None  # int64 [K], same for sampled negatives, if any
    bank_rows: Tensor | None = None  # int64 [at most E], rows in the bank; None: `items`
    write_index: Tensor | None = None  # int64, positions of these items among all E
    bank_reads: BankRoute | None = None  # route of `history.items`; None: computed in the step
    bank_writes: BankRoute | None = None  # route of `bank_write_rows`; None: computed in the step
    encoded: EncodedItems | None = None  # None: chosen in the step, if `encoder_share` is below 1
    exchange: ItemExchange | None = None  # None: each rank encodes its own items

    @property
    def bank_write_rows(self) -> Tensor:
        """Rows of the memory bank that get the vectors of `items`, int64 [at most E]."""
        return self.items if self.bank_rows is None else self.bank_rows


@dataclass
class ItemExchange:
    """The item vectors that ranks exchange with each other."""

    rows: Tensor  # int64 [sum of send_counts], grouped by receiving rank
    send_counts: list[int]
    receive_counts: list[int]


@dataclass
class Negatives:
    """Sampled negatives of retrieval; their ids are also a feature of `sequence_features`."""

    items: Tensor  # int64 [K]
    log_q: Tensor  # [K], log-probability of sampling each


@dataclass
class Batch(Pipelineable):
    """Impressions of one step on one rank, with the content of their items.

    A batch has the fields of `torchrec.datasets.utils.Batch`. `TrainPipelineSparseDist` needs
    sharded features as attributes of the batch, to send their ids ahead of the step.

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
        batch.target.items  # [7, 9]
    """

    dense_features: Tensor  # [B, F]
    sparse_features: KeyedJaggedTensor | None  # ids of the pooled tables, if there are any
    labels: Tensor  # [B, C], NaN for null
    # Ids of the target item (length 1 each), of the history (all, or the unique ids), of extra
    # histories, and of lists of ids beside histories.
    sequence_features: KeyedJaggedTensor
    rows: Rows
    target: TargetItems
    history: History
    content: BatchContent
    negatives: Negatives | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return _mapped(self, lambda tensor: tensor.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return _mapped(self, lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: Any) -> None:
        _mapped(self, lambda tensor: tensor.record_stream(stream))

    @property
    def contrastive_weights(self) -> Tensor:
        """Weight of each row in losses on item ID vectors [B]: 0 if the item has no own vector."""
        weights, has_row = self.rows.loss_weights, self.target.has_row
        return weights if has_row is None else weights * has_row

    @property
    def batch_size(self) -> int:
        return self.labels.shape[0]


def _mapped(node: Node, function: Callable[[Any], Any]) -> Node:
    """Return a copy of a node of a batch in which `function` has replaced every tensor."""
    if isinstance(node, Tensor | KeyedJaggedTensor):
        mapped: Node = function(node)
        return mapped
    if isinstance(node, dict):
        return {name: _mapped(value, function) for name, value in node.items()}  # type: ignore[return-value]
    if isinstance(node, list):
        return [_mapped(value, function) for value in node]  # type: ignore[return-value]
    if is_dataclass(node) and not isinstance(node, type):
        values = {item.name: _mapped(getattr(node, item.name), function) for item in fields(node)}
        return replace(node, **values)
    return node
