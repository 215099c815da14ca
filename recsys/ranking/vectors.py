"""Inputs of a ranking model, ID vectors and content vectors, and its outputs besides logits.

Shapes: B batch, U unique history items, N history items of the whole batch, D dimension,
M modalities, S sampled negatives, C labels, K members of an ensemble.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass
class IDVectors:
    """Looked-up ID embeddings.

    pooled: one [B, D_table] per pooled feature, in the order of the configuration.
    target: [B, D], vectors of the target item.
    history: [U, D], vectors of `history_items`; [N, D] if not `history_is_unique`.
    negatives: [S, D], vectors of the sampled negatives; None if none are sampled.
    further: one [events, D] per extra sequence, in the order of `Batch.history.further`.
    """

    pooled: list[Tensor]
    target: Tensor
    history: Tensor
    history_is_unique: bool = True
    negatives: Tensor | None = None
    further: list[Tensor] = field(default_factory=list)

    def float(self) -> IDVectors:
        return replace(self, pooled=[vectors.float() for vectors in self.pooled])


@dataclass
class MemberLogits:
    """Output of an ensemble in training: members [K, B, C], each with a loss of its own."""

    members: Tensor

    @property
    def logits(self) -> Tensor:  # [B, C]
        return self.members.mean(0)

    def float(self) -> MemberLogits:
        return MemberLogits(self.members.float())


@dataclass
class TowerVectors:
    """Output of a retrieval model, in place of logits.

    query: [B, C, D]; its dot product with an item's vector is the logit; item: [B, D].
    negatives: [S, D], vectors of the sampled negatives; None if none are sampled.
    bias: [C], added to the logits of all items alike; None for no bias.
    """

    query: Tensor
    item: Tensor
    negatives: Tensor | None = None
    bias: Tensor | None = None

    @property
    def scores(self) -> Tensor:  # [B, C]
        """Dot products of each row's query and target, without bias; retrieval ranks by them."""
        return (self.query * self.item.unsqueeze(1)).sum(dim=2)

    @property
    def logits(self) -> Tensor:  # [B, C]
        return self.scores if self.bias is None else self.scores + self.bias

    def float(self) -> TowerVectors:
        negatives = None if self.negatives is None else self.negatives.float()
        return TowerVectors(self.query.float(), self.item.float(), negatives, self.bias)
