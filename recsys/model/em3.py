"""EM3: one model of sharded ID tables, a content branch, a ranking model and two losses.

The top forward has no branches on data, because `TrainPipelineSparseDist` traces it with torch.fx
to send the ids of the next batches ahead; for the same reason the sharded collections read their
ids directly from attributes of the batch. Code that depends on data lives in submodules without
sharded modules, which the tracer treats as leaves.

Shapes: B batch, C labels, D dimension, F pooled features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from recsys.content.branch import ContentBranch
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.model.auxiliary import AuxiliaryInputs, AuxiliaryLosses
from recsys.model.losses import ContentIDContrastive, RankingLoss
from recsys.model.retrieval_loss import RetrievalLoss
from recsys.ranking.vectors import IDVectors, MemberLogits, TowerVectors


class IDDropout(nn.Module):
    """Dropout of whole ID vectors: in training each is zero with probability p, without scaling.

    New ids have a vector that was never trained and is nearly zero. A model that never saw such
    vectors trusts them; a model that did uses history and content instead.

    Example::

        IDDropout(0.5)(torch.ones(2, 3))  # rows of zeros and of ones
    """

    def __init__(self, p: float) -> None:
        """Keep the probability that a vector is zero."""
        super().__init__()
        self.p = p

    def forward(self, vectors: Tensor) -> Tensor:  # [B, D] -> [B, D]
        """Return the vectors, some of them zero in training."""
        if not self.training or not self.p:
            return vectors
        is_kept = torch.rand(len(vectors), 1, device=vectors.device) >= self.p
        return vectors * is_kept.to(vectors.dtype)

    def extra_repr(self) -> str:
        """Return the probability, for `print`."""
        return f"p={self.p}"


class ReadIDs(nn.Module):
    """Lookup results -> `IDVectors`, read by key in the order of the configuration.

    Args:
        pooled_features, target, history, negatives: names of the features looked up.
        history_is_unique: see `IDVectors`.
        dropout: probability p of `IDDropout` by pooled feature; 0 for features not named.
    """

    def __init__(
        self,
        pooled_features: list[str],
        target: str,
        history: str | None,
        history_is_unique: bool = True,
        negatives: str | None = None,
        dropout: Mapping[str, float] | None = None,
    ) -> None:
        """Keep the names of the features and create their dropouts."""
        super().__init__()
        dropout = dropout or {}
        self.pooled_dropouts = nn.ModuleList(
            IDDropout(dropout.get(name, 0.0)) for name in pooled_features
        )
        self.pooled_features, self.target, self.history = pooled_features, target, history
        self.history_is_unique, self.negatives = history_is_unique, negatives

    def forward(self, pooled: Any, sequences: Any) -> IDVectors:
        """Return the looked-up vectors as `IDVectors`.

        Args:
            pooled: KeyedTensor with F vectors [B, D] per row; None without pooled features.
            sequences: JaggedTensor per feature, of target, history and negatives.
        """
        by_name = pooled.to_dict() if self.pooled_features else {}
        target = sequences[self.target].values()
        history = sequences[self.history].values() if self.history else target[:0]
        pooled_vectors = [
            dropout(by_name[name])
            for name, dropout in zip(self.pooled_features, self.pooled_dropouts)
        ]
        negatives = sequences[self.negatives].values() if self.negatives else None
        return IDVectors(pooled_vectors, target, history, self.history_is_unique, negatives)


class Losses(nn.Module):
    """Sum of the losses: ranking or retrieval, Content-ID-Contrastive, and auxiliary ones.

    Args:
        ranking: loss of the logits.
        contrastive: optional CIC loss, scaled by `weight`.
        weight: weight of the CIC loss.
        retrieval: softmax loss of tower vectors; None applies `ranking` to their logits.
        auxiliary: optional further losses with their weights, in training only.
    """

    def __init__(
        self,
        ranking: RankingLoss,
        contrastive: ContentIDContrastive | None,
        weight: float,
        retrieval: RetrievalLoss | None = None,
        auxiliary: AuxiliaryLosses | None = None,
    ) -> None:
        """Keep the parts of the loss."""
        super().__init__()
        self.ranking, self.contrastive, self.weight = ranking, contrastive, weight
        self.retrieval, self.auxiliary = retrieval, auxiliary

    def forward(
        self,
        scored: Tensor | MemberLogits | TowerVectors,
        ids: IDVectors,
        content: ContentVectors | None,
        batch: Batch,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return the loss to minimise [], its parts without gradient, and the logits [B, C].

        When a retrieval model is not training, the parts include its vectors: `query` [B, D] for
        the first label and `item` [B, D].

        Args:
            scored: output of the ranking model: logits [B, C], members' logits or tower vectors.
            ids: looked-up ID vectors.
            content: content vectors; None for the ID-only twin.
            batch: the batch, with its labels.

        Raises:
            ValueError: the loss is a softmax over items and the model returns no tower vectors.
        """
        logits = scored if isinstance(scored, Tensor) else scored.logits
        loss, parts = self._parts(scored, logits, ids, content, batch)
        if self.auxiliary is not None and self.training:
            more, of_auxiliary = self.auxiliary(AuxiliaryInputs(logits, ids, content, batch))
            parts = {"loss": loss + more, "ranking": loss} | parts | of_auxiliary
            loss = parts["loss"] = loss + more
        if isinstance(scored, TowerVectors) and not self.training:
            parts |= {"query": scored.query[:, 0], "item": scored.item}
        return loss, {name: value.detach() for name, value in parts.items()}, logits

    def _parts(
        self,
        scored: Tensor | MemberLogits | TowerVectors,  # [B, C] if a Tensor
        logits: Tensor,  # [B, C]
        ids: IDVectors,
        content: ContentVectors | None,
        batch: Batch,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.retrieval is not None:
            if not isinstance(scored, TowerVectors):
                raise ValueError(
                    "ranking.loss is a softmax over items, for which the model of ranking.name has "
                    "to return TowerVectors; set ranking.loss to pointwise"
                )
            ranking = self.retrieval(scored, batch)
        else:
            each = scored.members if isinstance(scored, MemberLogits) else logits
            ranking = self.ranking(each, batch.labels, batch.row_weights)
        if self.contrastive is None:
            return ranking, {"loss": ranking}
        assert content is not None
        contrastive = self.contrastive(
            content.target, ids.target, batch.target_items, batch.row_weights
        )
        loss = ranking + self.weight * contrastive
        return loss, {"loss": loss, "ranking": ranking, "contrastive": contrastive}


class EM3(nn.Module):
    """A batch -> (loss, (parts of the loss, logits [B, C], batch)), as TorchRec's pipelines expect.

    Args:
        embedding_bags: pooled ID tables, or None.
        embeddings: the table of target item and history.
        content: the content branch; None for the ID-only twin.
        read_ids: reads the lookup results.
        ranking: a module of `recsys.ranking`; it returns logits, the logits of each member of an
            ensemble, or the vectors of a retrieval model.
        losses: sum of the losses.

    Example::

        from embeddings import TableConfig
        from recsys import EM3
        from recsys.config import Config
        from recsys.data.schema import Column, Schema
        from recsys.model.build import build_em3

        columns = {"item": Column("id", num_embeddings=100), "liked": Column("label")}
        tables = [TableConfig("item", 100, 32, ["item"])]
        model: EM3 = build_em3(Config(), Schema("item", "item", columns), tables, {}, None, "cpu")
        # model(batch), of a recsys.Batch, returns the loss and (its parts, logits, batch)
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
        """Keep the parts of the model."""
        super().__init__()
        self.embedding_bags = embedding_bags
        self.embeddings = embeddings
        self.content = content
        self.read_ids = read_ids
        self.ranking = ranking
        self.losses = losses

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor, Batch]]:
        """Return the loss [], and its parts, the logits [B, C] and the batch. A collective."""
        pooled = (
            self.embedding_bags(batch.sparse_features) if self.embedding_bags is not None else None
        )
        sequences = self.embeddings(batch.sequence_features)
        # Runs before the looked-up vectors are read, so that it overlaps with their communication,
        # and in the backward with that of their gradients.
        content = self.content(batch) if self.content is not None else None
        ids = self.read_ids(pooled, sequences)
        scored = self.ranking(ids, content, batch)
        loss, parts, logits = self.losses(scored, ids, content, batch)
        return loss, (parts, logits, batch)
