"""What a ranking model gets: ID vectors from the sharded tables, content vectors from the branch.

Shapes: B batch, U unique history items, N history items of the whole batch, D dimension,
M modalities, S sampled negatives, C labels, K members of an ensemble.
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
    negatives: [S, D], where a retrieval model samples them.
    """

    pooled: list[Tensor]
    target: Tensor
    history: Tensor
    history_is_unique: bool = True
    negatives: Tensor | None = None


@dataclass
class MemberLogits:
    """What an ensemble gives in training in place of its mean logits.

    members: [K, B, C], each of which has a loss of its own.
    """

    members: Tensor

    @property
    def logits(self) -> Tensor:  # [B, C]
        return self.members.mean(0)

    def float(self) -> MemberLogits:
        """The same in float32."""
        return MemberLogits(self.members.float())


@dataclass
class TowerVectors:
    """What a retrieval model gives in place of logits.

    query: [B, C, D], scaled so that its dot product with an item's vector is the logit.
    item: [B, D] of the target.
    negatives: [S, D] of the sampled negatives, None where none are sampled.
    bias: [C], added to the logits of all items alike; None for none.
    """

    query: Tensor
    item: Tensor
    negatives: Tensor | None = None
    bias: Tensor | None = None

    @property
    def scores(self) -> Tensor:  # [B, C]
        """Of each row's target, by which items are searched."""
        return (self.query * self.item.unsqueeze(1)).sum(dim=2)

    @property
    def logits(self) -> Tensor:  # [B, C]
        return self.scores if self.bias is None else self.scores + self.bias

    def float(self) -> TowerVectors:
        """The same in float32."""
        negatives = None if self.negatives is None else self.negatives.float()
        return TowerVectors(self.query.float(), self.item.float(), negatives, self.bias)
