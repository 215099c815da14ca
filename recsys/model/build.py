"""Builds EM3 from configuration, tables and encoders."""

from dataclasses import replace

import torch.distributed as dist
from torch import nn

from embeddings import (
    MemoryBank,
    TableConfig,
    build_embedding_bag_collection,
    build_embedding_collection,
)
from recsys.config import (
    Config,
    ContentSettings,
    RankingSettings,
    content_settings,
    softmax_settings,
)
from recsys.config.named_parts import make_part
from recsys.config.ranking import RetrievalSettings
from recsys.content.branch import ContentBranch
from recsys.content.encoders.base import Encoder
from recsys.data.negatives import negatives_feature
from recsys.data.schema import Schema
from recsys.model.auxiliary import build_auxiliary
from recsys.model.em3 import EM3, TotalLoss
from recsys.model.inputs import IDVectorReader, InputScaling, RowsPerID
from recsys.model.losses import CodeLoss, ContentIDContrastive, RankingLoss, RetrievalLoss
from recsys.model.tables import id_dropouts, pooled_features, target_dropout
from recsys.ranking import RANKING_MODELS
from recsys.ranking.layers.evidence import NUM_VOTES
from recsys.ranking.layers.row_features import ExtraSequences
from recsys.ranking.neighbours import Neighbours
from recsys.ranking.settings import NumbersSettings
from recsys.ranking.vectors import InputDimensions


def build_em3(
    config: Config,
    schema: Schema,
    tables: list[TableConfig],
    encoders: dict[str, Encoder],  # by modality
    bank: MemoryBank | None,
    device: str = "meta",
    process_group: dist.ProcessGroup | None = None,  # ranks that train together; None: one rank
) -> EM3:
    """Build the model, with its tables on `device` (meta: allocated when sharded)."""
    content = content_settings(config.content)
    _check_labels(config.ranking, config.best_model_by, schema)
    dims = {table.name: table.embedding_dim for table in tables}
    pooled = pooled_features(config.embedding, schema)
    extra_sequences = _build_extra_sequences(config, schema, dims[schema.target_item])
    widths = extra_sequences.widths if extra_sequences is not None else {}
    dimensions = InputDimensions.from_schema(schema, pooled, dims, process_group, widths)
    neighbours = None
    if config.neighbours is not None:
        neighbours = Neighbours(config.neighbours, dimensions, content)
        dimensions = replace(dimensions, num_dense=dimensions.num_dense + NUM_VOTES)
    embeddings = build_embedding_collection(tables, device)
    assert embeddings is not None
    # Built before content and ranking: the order decides which random numbers each part gets.
    losses = _build_losses(config, schema, dims[schema.target_item])
    negatives = negatives_feature(softmax_settings(config.ranking), schema.target_item)
    dropouts = id_dropouts(config.embedding, schema)
    parallel, extra_ids = _id_columns(content, schema)
    id_reader = IDVectorReader(
        pooled, schema.target_item, schema.history, negatives, dropouts, parallel, extra_ids
    )
    return EM3(
        embedding_bags=build_embedding_bag_collection(tables, device),
        embeddings=embeddings,
        content=ContentBranch(encoders, content, bank) if content is not None else None,
        id_reader=id_reader,
        ranking=build_ranking(config.ranking, dimensions, content),
        losses=losses,
        further_histories=extra_sequences,
        scaling=_build_scaling(config.ranking, schema),
        neighbours=neighbours,
        target_dropout=target_dropout(config, schema),
    )


def _check_labels(ranking: RankingSettings, best_model_by: str, schema: Schema) -> None:
    labels = dict(zip(schema.of_kind("label"), schema.label_losses, strict=True))
    if unknown := sorted(set(ranking.label_weights) - set(labels)):
        raise ValueError(
            f"ranking.label_weights: no label {unknown}; the labels are {list(labels)}"
        )
    numeric_labels = [name for name, loss in labels.items() if loss != "bce"]
    if numeric_labels and softmax_settings(ranking) is not None:
        raise ValueError(
            f"ranking.loss is a softmax over items, which label '{numeric_labels[0]}' with loss "
            f"{labels[numeric_labels[0]]} cannot choose; set ranking.loss to pointwise"
        )
    first, metric = next(iter(labels)), best_model_by
    if (first in numeric_labels) != (metric in ("rmse", "mae")):
        fitting = "auc, gauc, auc_and_gauc or all_and_unseen"
        fitting = "rmse or mae" if first in numeric_labels else fitting
        raise ValueError(
            f"best_model_by is {metric}, which the first label, '{first}' with loss "
            f"{labels[first]}, does not define; set best_model_by to {fitting}"
        )


def _id_columns(
    content: ContentSettings | None, schema: Schema
) -> tuple[RowsPerID, list[RowsPerID]]:
    """Return the ID lists beside the first history, and all ID columns of each further one."""
    columns: list[RowsPerID] = [
        {name: schema.rows_per_id(name) for name in (history.name, *history.ids)}
        for history in schema.histories
    ]
    if not columns:
        return {}, []
    parallel = {name: rows for name, rows in columns[0].items() if name != schema.history}
    if parallel and content is not None and content.history.top_k:
        raise ValueError(
            f"content.history.top_k is {content.history.top_k}, but '{schema.history}' has lists "
            f"of ids beside it ({list(parallel)}), which the search cannot shorten; set top_k to 0"
        )
    return parallel, columns[1:]


def _build_extra_sequences(config: Config, schema: Schema, dim: int) -> ExtraSequences | None:
    content, extra = content_settings(config.content), schema.histories[1:]
    names = [sequence.name for sequence in extra]
    allowed = [name for name in names if schema.table_of(name) == schema.target_item]
    columns = [] if content is None else content.history.columns
    for name in columns:
        if name not in allowed or columns.count(name) > 1:
            raise ValueError(
                f"content.history.columns: '{name}' is named twice or is no further sequence of "
                f"items of '{schema.target_item}'; these are {allowed}"
            )
    return ExtraSequences(config.ranking, dim, extra, content) if extra else None


def _build_scaling(ranking: RankingSettings, schema: Schema) -> InputScaling | None:
    lists = [history.numbers for history in schema.histories]
    if not ranking.scale_inputs:
        return None
    by_model = isinstance(ranking, NumbersSettings) and ranking.standardize_numbers
    scaling = InputScaling([] if by_model else schema.of_kind("dense"), lists)
    return scaling if scaling.names else None


def _build_losses(config: Config, schema: Schema, id_dim: int) -> TotalLoss:
    content = content_settings(config.content)
    contrastive = None
    if content is not None and config.contrastive.weight > 0:
        contrastive = ContentIDContrastive(content.dim, id_dim, config.contrastive)
    labels, softmax = schema.of_kind("label"), softmax_settings(config.ranking)
    weights = [config.ranking.label_weights.get(label, 1.0) for label in labels]
    retrieval: RetrievalLoss | CodeLoss | None = None
    if softmax is not None:
        is_codes = softmax.loss == "codes"
        retrieval = CodeLoss(weights[0]) if is_codes else RetrievalLoss(softmax, weights)
    ranking = RankingLoss(weights, schema.label_losses)
    auxiliary = build_auxiliary(config.auxiliary, schema)
    return TotalLoss(ranking, contrastive, config.contrastive.weight, retrieval, auxiliary)


def build_ranking(
    settings: RankingSettings, dimensions: InputDimensions, content: ContentSettings | None
) -> nn.Module:
    """Return `Class(settings, dimensions, content)` for the class that `settings.name` names."""
    can_exclude_seen = dimensions.has_history and dimensions.num_items > 0
    if isinstance(settings, RetrievalSettings) and settings.exclude_seen and not can_exclude_seen:
        raise ValueError(
            "ranking.exclude_seen leaves out the items of the history, and schema.yaml has no "
            "column of kind sequence, or a bounded vocabulary of items; set exclude_seen to false"
        )
    return make_part(
        "ranking.name", settings.name, RANKING_MODELS, nn.Module, settings, dimensions, content
    )
