"""Builds EM3 from configuration, tables and encoders."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from embeddings import (
    MemoryBank,
    TableConfig,
    build_embedding_bag_collection,
    build_embedding_collection,
)
from recsys.config import Config, content_settings, softmax_settings
from recsys.content.branch import ContentBranch
from recsys.content.encoders.base import Encoder
from recsys.data.negatives import negatives_feature
from recsys.data.schema import Schema
from recsys.model.auxiliary import build_auxiliary
from recsys.model.em3 import EM3, Losses, ReadIDs
from recsys.model.losses import ContentIDContrastive, RankingLoss
from recsys.model.retrieval_loss import RetrievalLoss
from recsys.model.tables import id_dropouts, pooled_features
from recsys.ranking.build import build_ranking
from recsys.ranking.dimensions import InputDimensions


def build_em3(
    config: Config,
    schema: Schema,
    tables: list[TableConfig],
    encoders: dict[str, Encoder],
    bank: MemoryBank | None,
    device: str = "meta",
    item_categories: Tensor | None = None,  # int32 [num_items, C]
    process_group: dist.ProcessGroup | None = None,
) -> EM3:
    """Build the model, with its tables on `device` (meta: allocated when sharded).

    `encoders` are by modality; `item_categories` is the result of `load_item_categories`;
    `process_group` has the ranks that train the model together, None for a single rank.

    Raises:
        ValueError: unknown parts, or label weights for labels that do not exist.
    """
    content = content_settings(config)
    labels = schema.of_kind("label")
    unknown = sorted(set(config.ranking.label_weights) - set(labels))
    if unknown:
        raise ValueError(f"ranking.label_weights: no label {unknown}; the labels are {labels}")
    dims = {table.name: table.embedding_dim for table in tables}
    pooled = pooled_features(config, schema)
    dimensions = InputDimensions.of(schema, pooled, dims, item_categories, process_group)
    embeddings = build_embedding_collection(tables, device)
    assert embeddings is not None
    # Built before content and ranking: the order decides which random numbers each part gets.
    losses = _build_losses(config, schema, dims[schema.target_item])
    negatives = negatives_feature(softmax_settings(config.ranking), schema.target_item)
    return EM3(
        embedding_bags=build_embedding_bag_collection(tables, device),
        embeddings=embeddings,
        content=ContentBranch(encoders, content, bank) if content is not None else None,
        read_ids=ReadIDs(
            pooled,
            schema.target_item,
            schema.history,
            config.embedding.index_dedup,
            negatives,
            id_dropouts(config, schema),
        ),
        ranking=build_ranking(config.ranking, dimensions, content),
        losses=losses,
    )


def _build_losses(config: Config, schema: Schema, id_dim: int) -> Losses:
    """Return the losses of a run; `id_dim` is the width of the target item's ID vectors."""
    content = content_settings(config)
    contrastive = None
    if content is not None and config.contrastive.weight > 0:
        contrastive = ContentIDContrastive(content.dim, id_dim, config.contrastive)
    labels, softmax = schema.of_kind("label"), softmax_settings(config.ranking)
    weights = [config.ranking.label_weights.get(label, 1.0) for label in labels]
    return Losses(
        RankingLoss(weights),
        contrastive,
        config.contrastive.weight,
        RetrievalLoss(softmax, weights) if softmax is not None else None,
        build_auxiliary(config.auxiliary, schema),
    )
