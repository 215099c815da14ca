"""EM3: one model of sharded ID tables, a content branch, a ranking model and its losses.

`TrainPipelineSparseDist` traces the top forward, which therefore has no branches on data. Shapes:
B batch, C labels, D dimension.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from recsys.content.branch import ContentBranch
from recsys.content.vectors import ContentVectors, ItemRows
from recsys.data.batch import Batch
from recsys.model.auxiliary import AuxiliaryInputs, AuxiliaryLosses
from recsys.model.inputs import IDVectorReader, InputScaling
from recsys.model.losses import CodeLoss, ContentIDContrastive, RankingLoss, RetrievalLoss
from recsys.ranking.layers.row_features import ExtraSequences
from recsys.ranking.neighbours import BlendedLogits, Neighbours
from recsys.ranking.vectors import CodeLogits, IDVectors, MemberLogits, TowerVectors

Scored = Tensor | MemberLogits | TowerVectors | CodeLogits | BlendedLogits

# Loss [], its terms, logits [B, C].
ScoredBatch = tuple[Tensor, dict[str, Tensor], Tensor]


class TotalLoss(nn.Module):
    """Sum of the losses: ranking or retrieval, Content-ID-Contrastive (CIC), and auxiliary ones.

    `weight` is that of CIC. Without `retrieval`, `ranking` applies to the logits of tower vectors.
    """

    def __init__(
        self,
        ranking: RankingLoss,
        contrastive: ContentIDContrastive | None,
        weight: float,
        retrieval: RetrievalLoss | CodeLoss | None = None,
        auxiliary: AuxiliaryLosses | None = None,
    ) -> None:
        super().__init__()
        self.ranking, self.contrastive, self.weight = ranking, contrastive, weight
        self.retrieval, self.auxiliary = retrieval, auxiliary
        self._computes = True

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self._computes = False
        try:
            yield
        finally:
            self._computes = True

    def forward(
        self, scored: Scored, ids: IDVectors, content: ContentVectors | None, batch: Batch
    ) -> ScoredBatch:
        """Return the loss to minimise [], its terms without gradient, and the logits [B, C].

        In evaluation a retrieval model adds `query` and `item` [B, D] of the first label, and
        neighbours add `network`, `evidence_logits` and `evidence`, which the blend is fitted to.
        """
        logits = scored if isinstance(scored, Tensor) else scored.logits
        terms: dict[str, Tensor] = {}
        loss = logits.new_zeros(())
        if self._computes:
            loss, terms = self._terms(scored, logits, ids, content, batch)
        if self.auxiliary is not None and self.training:
            inputs = AuxiliaryInputs(logits, ids, content, batch)
            auxiliary_loss, auxiliary_terms = self.auxiliary(inputs)
            terms = {"loss": loss + auxiliary_loss, "ranking": loss} | terms | auxiliary_terms
            loss = terms["loss"] = loss + auxiliary_loss
        if isinstance(scored, TowerVectors | CodeLogits) and not self.training:
            terms |= {"query": scored.query[:, 0], "item": scored.item}
        if isinstance(scored, BlendedLogits) and not self.training:
            terms |= {"network": scored.network_logits, "evidence": scored.neighbours.evidence}
            terms["evidence_logits"] = scored.neighbours.logits
        return loss, {name: value.detach() for name, value in terms.items()}, logits

    def _terms(
        self,
        scored: Scored,  # [B, C] if a Tensor
        logits: Tensor,  # [B, C]
        ids: IDVectors,
        content: ContentVectors | None,
        batch: Batch,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.retrieval is not None:
            if isinstance(self.retrieval, RetrievalLoss) and not isinstance(scored, TowerVectors):
                raise ValueError(
                    "ranking.loss is a softmax over items, for which the model of ranking.name has "
                    "to return TowerVectors; set ranking.loss to pointwise"
                )
            ranking = self.retrieval(scored, batch)
        else:
            labels, weights = batch.labels, batch.rows.label_loss_weights
            network = scored.network if isinstance(scored, BlendedLogits) else scored
            members = network.members if isinstance(network, MemberLogits) else network
            members = members if isinstance(members, Tensor) else logits
            ranking = self.ranking(members, labels, weights)
            if isinstance(scored, BlendedLogits):
                for evidence_logits in (scored.neighbours.regression, scored.neighbours.logits):
                    ranking = ranking + self.ranking(evidence_logits, labels, weights)
        if self.contrastive is None:
            return ranking, {"loss": ranking}
        assert content is not None
        items, weights = batch.target.items, batch.contrastive_weights
        contrastive = self.contrastive(content.target, ids.target, items, weights)
        loss = ranking + self.weight * contrastive
        return loss, {"loss": loss, "ranking": ranking, "contrastive": contrastive}


class Scoring(nn.Module):
    """Computes losses from vectors: on GPUs `compile` makes it one graph in training.

    It is a module without weights of its own, so that TorchRec's trace does not enter it.
    """

    def __init__(self, compute: Callable[..., ScoredBatch]) -> None:
        super().__init__()
        self.compute, self.compiled = compute, compute

    def forward(
        self, ids: IDVectors, content: ContentVectors | ItemRows | None, batch: Batch
    ) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor, Batch]]:
        compute = self.compiled if self.training else self.compute
        loss, terms, logits = compute(ids, content, batch)
        return loss, (terms, logits, batch)


class EM3(nn.Module):
    """A batch -> (loss, (terms of the loss, logits [B, C], batch)), as TorchRec's pipelines expect.

    `embeddings` is the table of target and history. `content` is None for the ID-only baseline.
    `ranking` returns logits, `MemberLogits` or `TowerVectors`. `scaling` standardises numbers.
    `neighbours` adds dense features to the batch, and blends its evidence with the logits.
    In training, the ranking model reads zeros for the share `target_dropout` of target vectors.

    Example::

        from embeddings import TableConfig
        from recsys import EM3
        from recsys.config import Config
        from recsys.data.schema import Column, Schema
        from recsys.model.build import build_em3

        columns = {"item": Column("id", num_embeddings=100), "liked": Column("label")}
        tables = [TableConfig("item", 100, 32, ["item"])]
        model: EM3 = build_em3(Config(), Schema("item", "item", columns), tables, {}, None, "cpu")
    """

    def __init__(
        self,
        embedding_bags: EmbeddingBagCollection | None,
        embeddings: EmbeddingCollection,
        content: ContentBranch | None,
        id_reader: IDVectorReader,
        ranking: nn.Module,
        losses: TotalLoss,
        further_histories: ExtraSequences | None = None,
        scaling: InputScaling | None = None,
        neighbours: Neighbours | None = None,
        target_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.target_dropout = target_dropout
        self.embedding_bags, self.embeddings = embedding_bags, embeddings
        self.content, self.id_reader = content, id_reader
        self.further_histories, self.scaling = further_histories, scaling
        self.ranking, self.losses, self.neighbours = ranking, losses, neighbours
        self.scoring = Scoring(self._scored)

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor, Batch]]:
        """Return the loss [], and its terms, the logits [B, C] and the batch. A collective."""
        bags = self.embedding_bags
        pooled = bags(batch.sparse_features) if bags is not None else None
        sequences = self.embeddings(batch.sequence_features)
        # Content runs before the looked-up vectors are read, to overlap with their communication
        # and, in the backward pass, with that of their gradients.
        content = self.content(batch) if self.content is not None else None
        ids = self.id_reader(pooled, sequences, batch)
        scored: tuple[Tensor, Any] = self.scoring(ids, content, batch)
        return scored

    def _scored(
        self, ids: IDVectors, content: ContentVectors | ItemRows | None, batch: Batch
    ) -> ScoredBatch:
        """Return the loss [], its terms and the logits [B, C]. A collective."""
        if isinstance(content, ItemRows):
            assert self.content is not None
            content = self.content.of_rows(content, batch.content)
        scaled_batch = self.scaling(batch) if self.scaling is not None else batch
        if self.further_histories is not None:
            ids = self.further_histories(ids, content, scaled_batch)
        newness, ranking_ids = None, ids
        if self.training and (self.neighbours is not None or self.target_dropout):
            # One number for both, so that a row that counts as new has neither vector nor votes.
            newness = torch.rand(len(ids.target), device=ids.target.device)
            if self.target_dropout:
                ranking_ids = ids.without_targets(newness < self.target_dropout)
        if self.neighbours is None:
            scored = self.ranking(ranking_ids, content, scaled_batch)
        else:
            neighbours = self.neighbours(content, scaled_batch, newness)
            scored = self.ranking(ranking_ids, content, neighbours.batch)
            scored = self.neighbours.blend(scored, neighbours)
        result: ScoredBatch = self.losses(scored, ids, content, batch)
        return result
