"""Builds a job from configuration and data, in the order every TorchRec user knows.

Tables on meta, model, optimizer in backward, plan, DistributedModelParallel, dense optimizer,
pipeline: `build_job` is that list, one line each.

Shapes: D dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer

from embeddings import (
    DenseGroup,
    MemoryBank,
    TableConfig,
    build_dense_optimizer,
    build_embedding_bag_collection,
    build_embedding_collection,
    build_memory_bank,
    describe_optimizers,
    format_plan,
    fuse_table_optimizers,
    initialize_optimizer_state,
    plan_sharding,
    sharders,
)
from embeddings.row_reset import RowReset
from recsys.accumulation import AccumulatingPipeline
from recsys.batch_preparation import BatchPreparation, chooses_items
from recsys.compilation import compile_dense_parts
from recsys.config import Config, ContentSettings
from recsys.content.branch import ContentBranch
from recsys.content.encoders import Encoder, build_encoder
from recsys.content.frozen_cache import cache_frozen_outputs
from recsys.content.preparation import load_preparation
from recsys.data.batch_builder import BatchBuilder
from recsys.data.content_store import ContentStore, ItemTable, default_cache
from recsys.data.filesystem import Location
from recsys.data.list_lengths import mean_list_lengths
from recsys.data.schema import Schema, load_schema
from recsys.data.vocabularies import BoundedVocabularies
from recsys.losses import ContentIDContrastive, RankingLoss
from recsys.model import EM3, Losses, ReadIDs
from recsys.negatives import NegativeSampler, negatives_feature
from recsys.precision import use_bfloat16
from recsys.ranking import build_ranking
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.item_categories import load_item_categories
from recsys.ranks import Ranks
from recsys.retrieval_loss import RetrievalLoss
from recsys.table_configs import id_dropouts, pooled_features, table_configs


@dataclass
class Job:
    """Everything a run works with on one rank."""

    config: Config
    root: Location
    schema: Schema
    ranks: Ranks
    store: ContentStore | None
    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    adamw: AdamW  # the dense part of `optimizer`
    schedule: LambdaLR
    pipeline: AccumulatingPipeline
    vocabularies: BoundedVocabularies
    preparation: BatchPreparation
    plan: str  # for people
    parameters: str  # for people: parameter, optimizer, learning rate

    @property
    def em3(self) -> EM3:
        """The model inside its wrappers."""
        model = self.model.module
        assert isinstance(model, EM3)
        return model

    def set_step(self, step: int, dense_step: int) -> None:
        """Sets the age that the bank writes and learning rates to those after so many steps."""
        self.schedule.last_epoch = dense_step
        for group, base, share in zip(
            self.adamw.param_groups,
            self.schedule.base_lrs,
            self.schedule.lr_lambdas,
            strict=True,
        ):
            group["lr"] = base * share(dense_step)
        if self.em3.content is not None:
            self.em3.content.step = step

    def batch_builder(self, with_labels: bool = True) -> BatchBuilder:
        """Makes batches as this model wants them."""
        content = self.em3.content
        return BatchBuilder(
            self.schema,
            pooled_features(self.config, self.schema),
            None if chooses_items(content_settings(self.config)) else self.store,
            encode_history=content is not None and content.encodes_history,
            index_dedup=self.config.embedding.index_dedup,
            with_labels=with_labels,
        )


def content_settings(config: Config) -> ContentSettings | None:
    """The settings of the content branch, None for the ID-only twin."""
    return config.content if isinstance(config.content, ContentSettings) else None


def build_content_store(
    config: Config, content: ContentSettings, root: Location, schema: Schema, ranks: Ranks
) -> tuple[ContentStore, dict[str, Encoder]]:
    """Tokenises, decodes and encodes what is frozen, once per machine; the encoders beside it."""
    cache = Path(config.cache).expanduser() if config.cache else default_cache()
    with ranks.all_or_none():
        items = ItemTable(root, schema, config.on_bad_row)
        store = ContentStore(items, content.modalities, cache)
    encoders: dict[str, Encoder] = {}
    for name, modality in content.modalities.items():
        with ranks.all_or_none():
            read = load_preparation(modality, f"content.modalities.{name}")
            if ranks.is_first_of_machine:
                store.build(name, read.tokenizer, read.fills_texts, read.images)
        with ranks.all_or_none():
            store.build(name, read.tokenizer, read.fills_texts, read.images)
            width = store.arrays[name].values.shape[-1] if modality.kind == "feature" else None
            encoders[name] = build_encoder(name, modality, width, read)
        for note in [*read.notes, *encoders[name].notes] if ranks.is_first else ():
            print(note, flush=True)
        if encoders[name].caches and modality.cache_frozen_layers:
            cache_frozen_outputs(store, name, encoders[name], ranks)
    return store, encoders


def _build_content(
    config: Config, root: Location, schema: Schema, ranks: Ranks
) -> tuple[ContentStore | None, dict[str, Encoder], MemoryBank | None]:
    """Items, encoders and memory bank; nothing for the ID-only twin."""
    content = content_settings(config)
    if content is None:
        return None, {}, None
    store, encoders = build_content_store(config, content, root, schema, ranks)
    if content.history.mode == "full":
        return store, encoders, None
    sizes = schema.num_items, content.vector_dim
    bank = build_memory_bank(*sizes, ranks.device, ranks.group, content.history.bank)
    return store, encoders, bank


def build_em3(
    config: Config,
    schema: Schema,
    tables: list[TableConfig],
    encoders: dict[str, Encoder],
    bank: MemoryBank | None,
    device: str = "meta",
    item_categories: Tensor | None = None,
) -> EM3:
    """The model, its tables on `device` (meta: allocated when sharded).

    `item_categories` are those of `load_item_categories`.

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
    id_dim = dims[schema.target_item]
    dimensions = InputDimensions.of(schema, pooled, dims, item_categories)
    embeddings = build_embedding_collection(tables, device)
    assert embeddings is not None
    contrastive = None
    if content is not None and config.contrastive.weight > 0:
        contrastive = ContentIDContrastive(content.dim, id_dim, config.contrastive)
    weights = [config.ranking.label_weights.get(label, 1.0) for label in labels]
    retrieval = None
    if config.ranking.loss != "pointwise":
        retrieval = RetrievalLoss(config.ranking, weights)
    negatives = negatives_feature(config.ranking, schema.target_item)
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
        losses=Losses(RankingLoss(weights), contrastive, config.contrastive.weight, retrieval),
    )


def dense_groups(config: Config) -> list[DenseGroup]:
    """AdamW's groups: what trains in the encoders, the rest of content, and everything else."""
    settings = config.optimizer
    decay = settings.weight_decay
    return [
        DenseGroup("encoders", ["content.encoders."], settings.encoder_learning_rate, decay),
        DenseGroup("content", ["content.", "losses."], settings.content_learning_rate, decay),
        DenseGroup("ranking", [""], settings.learning_rate, decay),
    ]


def warmup_schedule(adamw: AdamW, warmup_steps: int) -> LambdaLR:
    """Learning rates rise linearly over the first steps, then stay."""

    def share(step: int) -> float:
        return min(1.0, (step + 1) / max(warmup_steps, 1))

    return LambdaLR(adamw, share)


def build_job(config: Config, data: str, ranks: Ranks) -> Job:
    """Everything from configuration to pipeline. A collective.

    Raises:
        ValueError: on every rank, when any rank finds the data, the configuration or the plan
            wanting.
    """
    torch.manual_seed(config.seed)  # the same on all ranks: initial weights agree
    with ranks.all_or_none():
        root = Location.of(data)
        schema = load_schema(root)
        tables = table_configs(config, schema, mean_list_lengths(root, schema))
    store, encoders, bank = _build_content(config, root, schema, ranks)
    with ranks.all_or_none():
        categories = load_item_categories(config.ranking, root, schema, config.on_bad_row)
        em3 = build_em3(config, schema, tables, encoders, bank, item_categories=categories)
        fuse_table_optimizers(em3, tables)
        if config.precision == "bf16":
            use_bfloat16(em3, ranks.device)
        if config.compile:
            compile_dense_parts(em3, ranks.device)
    types = config.embedding.communication
    cuts = sharders(types.forward, types.backward)
    plan: ShardingPlan = plan_sharding(
        em3, tables, ranks.group, ranks.device, config.batch_size, module_sharders=cuts
    )
    model = DistributedModelParallel(
        em3, ShardingEnv.from_process_group(ranks.group), ranks.device, plan, cuts
    )
    optimizer, adamw = build_dense_optimizer(model, dense_groups(config))
    initialize_optimizer_state(adamw)  # a checkpoint fills only what is there
    schedule = warmup_schedule(adamw, config.optimizer.warmup_steps)
    bounded = [table for table in tables if table.name in schema.tables_with("bounded")]
    reset = RowReset(model, bounded, config.seed)
    pooled = pooled_features(config, schema)
    vocabularies = BoundedVocabularies(schema, pooled, ranks.group, reset)
    sampler = None
    if config.ranking.loss != "pointwise":
        sampler = NegativeSampler(config.ranking, schema.num_items, schema.target_item)
    pipeline = AccumulatingPipeline(model, optimizer, ranks.device, config.accumulate_steps)
    torch.manual_seed(config.seed + 1 + ranks.rank)  # dropout and negatives differ by rank
    return Job(
        config,
        root,
        schema,
        ranks,
        store,
        model,
        optimizer,
        adamw,
        schedule,
        pipeline,
        vocabularies,
        BatchPreparation(config, store, bank, vocabularies, ranks.group, sampler),
        plan=format_plan(plan, tables),
        parameters=describe_optimizers(model, tables, adamw),
    )
