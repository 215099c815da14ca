"""What a ranking model gets: ID vectors from the sharded tables, content vectors from the branch.

Shapes: B batch, U unique history items, N history items of the whole batch, D dimension,
M modalities.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class IDVectors:
    """Looked-up ID embeddings.

    pooled: one [B, D_table] per pooled feature, in the order of the configuration (the order in a
        KeyedTensor would depend on the sharding plan).
    target: [B, D] of the target item.
    history: [U, D] of the batch's `history_items`, or, where `history_is_unique` is False, [N, D]
        of each place of the histories.
    """

    pooled: list[Tensor]
    target: Tensor
    history: Tensor
    history_is_unique: bool = True


@dataclass
class ContentVectors:
    """Content vectors and, for similarities, the mean token of each of the M modalities.

    target: [B, D] with gradient into fusion and encoders.
    history: [U, D] of the batch's `history_items`, after the history map.
    target_modalities: [B, M, D], history_modalities: [U, M, D]; zero where an item lacks one, and
        M = 0 where `content.history.similarity_features` is off.
    """

    target: Tensor
    history: Tensor
    target_modalities: Tensor
    history_modalities: Tensor
