"""EM3: one model of sharded ID tables, a content branch, a ranking model and two losses.

The top forward is a straight line, because `TrainPipelineSparseDist` traces it with torch.fx to
send the ids of the next batches ahead; the sharded collections take their ids straight from
attributes of the batch for the same reason. Everything that decides on data lives in submodules
that hold nothing sharded, which the tracer leaves alone.

Shapes: B batch, C labels, D dimension.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from recsys.batch import Batch
from recsys.content.branch import ContentBranch
from recsys.losses import ContentIDContrastive, RankingLoss
from recsys.vectors import ContentVectors, IDVectors


class ReadIDs(nn.Module):
    """Lookup results -> `IDVectors`, read by key in the order of the configuration."""

    def __init__(
        self,
        pooled_features: list[str],
        target: str,
        history: str | None,
        history_is_unique: bool = True,
    ) -> None:
        super().__init__()
        self.pooled_features, self.target, self.history = pooled_features, target, history
        self.history_is_unique = history_is_unique

    def forward(self, pooled: Any, sequences: Any) -> IDVectors:
        by_name = pooled.to_dict() if self.pooled_features else {}
        target = sequences[self.target].values()
        history = sequences[self.history].values() if self.history else target[:0]
        pooled_vectors = [by_name[name] for name in self.pooled_features]
        return IDVectors(pooled_vectors, target, history, self.history_is_unique)


class Losses(nn.Module):
    """Ranking loss plus weight times the Content-ID-Contrastive loss."""

    def __init__(
        self, ranking: RankingLoss, contrastive: ContentIDContrastive | None, weight: float
    ) -> None:
        super().__init__()
        self.ranking, self.contrastive, self.weight = ranking, contrastive, weight

    def forward(
        self, logits: Tensor, ids: IDVectors, content: ContentVectors | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and its parts without gradient."""
        ranking = self.ranking(logits, batch.labels, batch.row_weights)
        if self.contrastive is None:
            return ranking, {"loss": ranking.detach()}
        assert content is not None
        contrastive = self.contrastive(
            content.target, ids.target, batch.target_items, batch.row_weights
        )
        loss = ranking + self.weight * contrastive
        parts = {"loss": loss, "ranking": ranking, "contrastive": contrastive}
        return loss, {name: value.detach() for name, value in parts.items()}


class EM3(nn.Module):
    """A batch -> (loss, (parts of the loss, logits [B, C], batch)), as TorchRec's pipelines want.

    Args:
        embedding_bags: pooled ID tables, or None.
        embeddings: the table of target item and history.
        content: the content branch; None is the ID-only twin.
        read_ids, ranking, losses: as they say.
    """

    def __init__(
        self,
        embedding_bags: EmbeddingBagCollection | None,
        embeddings: EmbeddingCollection,
        content: ContentBranch | None,
        read_ids: ReadIDs,
        ranking: nn.Module,
        losses: Losses,
    ) -> None:
        super().__init__()
        self.embedding_bags = embedding_bags
        self.embeddings = embeddings
        self.content = content
        self.read_ids = read_ids
        self.ranking = ranking
        self.losses = losses

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor, Batch]]:
        pooled = (
            self.embedding_bags(batch.sparse_features) if self.embedding_bags is not None else None
        )
        sequences = self.embeddings(batch.sequence_features)
        # Before the looked-up vectors are read: they travel meanwhile, and so do their gradients.
        content = self.content(batch) if self.content is not None else None
        ids = self.read_ids(pooled, sequences)
        logits = self.ranking(ids, content, batch)
        loss, parts = self.losses(logits, ids, content, batch)
        return loss, (parts, logits, batch)
