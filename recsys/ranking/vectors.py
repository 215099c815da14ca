"""Inputs of a ranking model, ID vectors and content vectors, their widths, and further outputs.

Shapes: B batch, U unique history items, N history items of the whole batch, D dimension,
M modalities, S sampled negatives, C labels, K members of an ensemble.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch.distributed as dist
from torch import Tensor

from recsys.data.schema import Schema

NO_CODES = -100.0  # logit of an item without codes, which no beam search finds


@dataclass(frozen=True)
class InputDimensions:
    """Widths and names of a ranking model's inputs."""

    pooled_dims: list[int]  # D of each pooled feature, then of each vector of extra sequences
    id_dim: int  # D of target and history items
    num_dense: int
    num_parallel: int
    num_labels: int
    pooled_names: tuple[str, ...] = ()
    dense_names: tuple[str, ...] = ()
    parallel_names: tuple[str, ...] = ()
    further_histories: tuple[str, ...] = ()  # the last of `pooled_names`: extra sequences
    group: str = ""  # the column of the user for whom items are ranked
    has_history: bool = True
    num_items: int = 0  # rows of the target item's table; 0 if items change (bounded)
    process_group: dist.ProcessGroup | None = None  # ranks that train together; None: one rank
    item_columns: tuple[str, ...] = ()  # pooled and dense ones derived from the ranked item

    @staticmethod
    def from_schema(
        schema: Schema,
        pooled_features: list[str],
        table_dims: dict[str, int],
        process_group: dist.ProcessGroup | None,
        extra_dims: Mapping[str, int],
    ) -> InputDimensions:
        """Return the dimensions of a dataset; `extra_dims` has those of extra sequences by name."""
        pooled_dims = [table_dims[schema.table_of(name)] for name in pooled_features]
        columns = [*pooled_features, *schema.of_kind("dense")]
        return InputDimensions(
            pooled_dims=[*pooled_dims, *extra_dims.values()],
            id_dim=table_dims[schema.target_item],
            num_dense=len(schema.of_kind("dense")),
            num_parallel=len(schema.parallel),
            num_labels=len(schema.of_kind("label")),
            pooled_names=(*pooled_features, *extra_dims),
            dense_names=tuple(schema.of_kind("dense")),
            parallel_names=tuple(schema.parallel),
            further_histories=tuple(extra_dims),
            group=schema.group,
            has_history=schema.history is not None,
            item_columns=tuple(
                name
                for name in columns
                if any(map(schema.is_of_items, schema.file_columns([name])))
            ),
            num_items=0 if schema.has_bounded_items else schema.num_items,
            process_group=process_group,
        )


@dataclass
class IDVectors:
    """Looked-up ID embeddings."""

    pooled: list[Tensor]  # [B, D_table] per pooled feature, in the order of the configuration
    target: Tensor  # [B, D], vectors of the target item
    history: Tensor  # [U, D], vectors of `history_items`; [N, D] if not `history_is_unique`
    history_is_unique: bool = True
    negatives: Tensor | None = None  # [S, D], of the sampled negatives; None if none are sampled
    # [events, D] per extra sequence, in the order of `Batch.history.extras`.
    further: list[Tensor] = field(default_factory=list)

    def without_targets(self, is_new: Tensor) -> IDVectors:  # bool [B]
        return replace(self, target=self.target.masked_fill(is_new.unsqueeze(1), 0))

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


Logits = Tensor | MemberLogits  # [B, C], or in training those of the members of an ensemble


@dataclass
class TowerVectors:
    """Output of a retrieval model, in place of logits."""

    query: Tensor  # [B, C, D]; its dot product with an item's vector is the logit
    item: Tensor  # [B, D]
    negatives: Tensor | None = None  # [S, D], of the sampled negatives; None if none are sampled
    bias: Tensor | None = None  # [C], added to the logits of all items alike

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


@dataclass
class CodeLogits:
    """Output of a generative model, in place of logits."""

    query: Tensor  # [B, 1, D], the state of the user from which a search decodes
    log_probs: Tensor  # [B], of the codes of the target item
    has_codes: Tensor  # bool [B], whether it has any

    @property
    def item(self) -> Tensor:  # [B, 1]
        return self.logits

    @property
    def logits(self) -> Tensor:  # [B, 1]
        return self.log_probs.masked_fill(~self.has_codes, NO_CODES).unsqueeze(1)

    def float(self) -> CodeLogits:
        return CodeLogits(self.query.float(), self.log_probs.float(), self.has_codes)
