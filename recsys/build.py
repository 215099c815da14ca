"""Build a job from configuration and data, in the usual order of TorchRec. Shapes: D dimension."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchrec.distributed.model_parallel import DistributedModelParallel, DMPCollection
from torchrec.distributed.types import ShardingEnv

from embeddings import (
    MemoryBank,
    TableConfig,
    format_plan,
    fuse_table_optimizers,
    plan_sharding,
    sharders,
)
from embeddings.sharding import CopiesMean
from embeddings.table_rows import RowReset
from recsys.config import Config, SourceSettings, content_settings, softmax_settings
from recsys.content.batch_preparation import BatchPreparation, chooses_items
from recsys.content.build import build_content
from recsys.data.batch_builder import BatchBuilder
from recsys.data.items.content_store import ContentStore
from recsys.data.negatives import NegativeSampler
from recsys.data.parquet.bad_rows import OnBadRow
from recsys.data.parquet.file import mean_list_lengths
from recsys.data.row_source import RowSource, open_rows
from recsys.data.schema import Schema, load_schema
from recsys.data.vocabularies import BoundedVocabularies
from recsys.distributed.pipeline import AccumulatingPipeline, DenseUpdate, PrefetchingPipeline
from recsys.distributed.ranks import Ranks
from recsys.distributed.torchrec_internals import DataParallelWrapper
from recsys.kernels import prepare_kernels
from recsys.model.build import build_em3
from recsys.model.em3 import EM3
from recsys.model.precision import (
    compile_dense_modules,
    compiles_by_default,
    dense_modules,
    use_bfloat16,
    uses_tf32,
)
from recsys.model.tables import check_placement, planner_hardware, pooled_features, table_configs
from recsys.optimizer.averaging import AveragedWeights, build_averages
from recsys.optimizer.dense import build_dense_optimizer, dense_groups, describe_optimizers
from recsys.optimizer.running_statistics import RunningStatistics
from recsys.optimizer.schedules import LearningRateShare, set_updates
from recsys.storage.location import Location

SPLITS = ("train", "valid", "test")


@dataclass
class Job:
    """All parts of a run on one rank."""

    config: Config
    root: Location
    schema: Schema
    ranks: Ranks
    store: ContentStore | None
    model: DistributedModelParallel
    schedule: LambdaLR
    pipeline: AccumulatingPipeline
    vocabularies: BoundedVocabularies
    preparation: BatchPreparation
    plan: str  # text table
    parameters: str  # text table: parameter, optimizer, learning rate
    train_folder: str  # of the dataset, with the rows to train on

    @property
    def dense_optimizer(self) -> Optimizer:
        return self.pipeline.update.dense

    @property
    def averages(self) -> AveragedWeights | None:
        return self.pipeline.update.averages

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the averaged weights, if any, replace the trained ones."""
        return nullcontext() if self.averages is None else self.averages.in_place()

    @property
    def em3(self) -> EM3:
        model = self.model.module
        assert isinstance(model, EM3)
        return model

    def set_step(self, step: int, dense_step: int) -> None:
        """Set the global step, and the learning rates after `dense_step` dense updates."""
        set_updates(self.schedule, dense_step)
        if self.em3.content is not None:
            self.em3.content.step = step

    def end_decay(self, num_updates: int) -> None:
        """Set the number of dense updates of all epochs, after which learning-rate decay ends."""
        for share in self.schedule.lr_lambdas:
            assert isinstance(share, LearningRateShare)
            share.end_at(num_updates)

    def updates_between(self, batches: Sequence[int]) -> int:
        """Count the dense updates from the first to the last batch number; each ends a group."""
        group = self.config.accumulate_steps
        return sum(-(-(end - begin) // group) for begin, end in pairwise(batches))

    def rows(self, split: str) -> RowSource:
        config, folder = self.config, self.train_folder if split == "train" else split
        return open_rows(config.source, self.root, folder, self.schema, config.on_bad_row)

    def batch_builder(self, with_labels: bool = True, with_content: bool = True) -> BatchBuilder:
        """Return the builder of batches; without labels, for files to predict."""
        content, settings = self.em3.content, content_settings(self.config.content)
        is_bounded, sampler = self.schema.has_bounded_items, self.preparation.negatives
        draws_negatives = sampler is not None and sampler.feature is not None
        items_chosen_later = chooses_items(settings, is_bounded, draws_negatives)
        return BatchBuilder(
            self.schema,
            pooled_features(self.config.embedding, self.schema),
            self.store if with_content and not items_chosen_later else None,
            encode_history=content is not None and content.encodes_history,
            with_labels=with_labels,
            content_histories=[] if settings is None else settings.history.columns,
        )


def build_job(
    config: Config, data: str, ranks: Ranks, schema: Schema | None = None, rows: str = "train"
) -> Job:
    """Build all parts of a run, by default with the dataset's own schema. A collective.

    Invalid data or an invalid plan is a ValueError on every rank.
    """
    torch.set_float32_matmul_precision("high" if uses_tf32(config, ranks.device) else "highest")
    torch.manual_seed(config.seed)  # the same on all ranks: initial weights agree
    with ranks.raise_on_all_ranks():
        root = Location.of(data)
        schema = schema or load_schema(root)
        device, ranks_per_node = ranks.device.type, ranks.local_world_size
        check_placement(config.embedding, schema, device, ranks.world_size, ranks_per_node)
        tables = table_configs(config, schema, mean_list_lengths(root, schema, rows))
    content, on_bad_row = content_settings(config.content), config.on_bad_row
    store, encoders, bank = build_content(content, root, schema, ranks, config.cache, on_bad_row)
    with ranks.raise_on_all_ranks():
        em3 = build_em3(config, schema, tables, encoders, bank, "meta", ranks.group)
        fuse_table_optimizers(em3, tables)
        prepare_kernels(em3, config.kernels, device)
        if config.precision == "bf16":
            use_bfloat16(dense_modules(em3).values(), ranks.device)
        compiles = compiles_by_default(ranks.device) if config.compile == "auto" else config.compile
        if compiles:
            compile_dense_modules(em3, ranks.device)
    settings = config.optimizer
    model, plan = _sharded(em3, tables, config, ranks)
    optimizer, dense = build_dense_optimizer(model, dense_groups(settings), settings)
    averages, statistics = build_averages(model, settings), RunningStatistics(em3, ranks.group)
    update = DenseUpdate(optimizer, dense, settings.clip_norm, averages, statistics)
    vocabularies = _vocabularies(config, schema, ranks, model, tables, bank, averages)
    torch.manual_seed(config.seed + 1 + ranks.rank)  # dropout and negatives differ by rank
    return Job(
        config,
        root,
        schema,
        ranks,
        store,
        model,
        LambdaLR(dense, LearningRateShare(settings)),
        _pipeline(model, update, config, ranks.device),
        vocabularies,
        _preparation(config, schema, ranks, em3, store, bank, vocabularies),
        plan,
        describe_optimizers(model, tables, dense),
        rows,
    )


def _sharded(
    em3: EM3, tables: list[TableConfig], config: Config, ranks: Ranks
) -> tuple[DistributedModelParallel, str]:
    """Shard the tables, make the dense parts data-parallel, and return the plan. A collective."""
    embedding, device, copies = config.embedding, ranks.device, config.embedding.parallel.copies
    table_sharders = sharders(*astuple(embedding.communication))  # forward, backward
    plan = plan_sharding(
        em3,
        tables,
        ranks.group,
        device,
        config.batch_size,
        module_sharders=table_sharders,
        prefetch=embedding.prefetch,
        copies=copies,
        hardware=planner_hardware(embedding.hardware),
    )
    plan_text = format_plan(plan, tables)  # before the copies of tables change its ranks
    parts: dict[str, Any] = {"sharders": table_sharders}
    parts["data_parallel_wrapper"] = DataParallelWrapper()
    if copies == 1:
        env = ShardingEnv.from_process_group(ranks.group)
        return DistributedModelParallel(em3, env, device, plan, **parts), plan_text
    size = ranks.world_size
    copied = DMPCollection(em3, device, plan, size, size // copies, ranks.group, **parts)
    return copied, plan_text


def _pipeline(
    model: DistributedModelParallel, update: DenseUpdate, config: Config, device: torch.device
) -> AccumulatingPipeline:
    embedding, mean = config.embedding, None
    if isinstance(model, DMPCollection):
        mean = CopiesMean(model, embedding.parallel.sync_every_steps)
    kind = PrefetchingPipeline if embedding.prefetch else AccumulatingPipeline
    return kind(model, update, device, config.accumulate_steps, mean)


def check_columns(
    source: SourceSettings, on_bad_row: OnBadRow, data: str, ranks: Ranks, schema: Schema | None
) -> None:
    """Open all splits and check the columns' types by their first rows. A collective.

    Files that cannot be read or do not fit the schema are a ValueError on every rank.
    """
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            root = Location.of(data)
            schema = schema or load_schema(root)
            for split in SPLITS:
                rows = open_rows(source, root, split, schema, on_bad_row)
                next(rows.read_chunks([0]))


def _vocabularies(
    config: Config,
    schema: Schema,
    ranks: Ranks,
    model: DistributedModelParallel,
    tables: list[TableConfig],
    bank: MemoryBank | None,
    averages: AveragedWeights | None,
) -> BoundedVocabularies:
    """Return the bounded vocabularies, which reset the row of an id that leaves them."""
    bounded = [table for table in tables if table.name in schema.tables_with("bounded")]
    reset_row = RowReset(model, bounded, config.seed)

    def reset(table: str, rows: Tensor) -> None:
        reset_row(table, rows)
        is_cuda = ranks.device.type == "cuda"  # steps write on the default stream
        with torch.cuda.stream(torch.cuda.default_stream(ranks.device) if is_cuda else None):
            if averages is not None:
                averages.copy_rows(table, rows)
            if table == schema.target_item and bank is not None:
                bank.forget(rows)

    features = pooled_features(config.embedding, schema)
    return BoundedVocabularies(schema, features, ranks.group, reset)


def _preparation(
    config: Config,
    schema: Schema,
    ranks: Ranks,
    em3: EM3,
    store: ContentStore | None,
    bank: MemoryBank | None,
    vocabularies: BoundedVocabularies,
) -> BatchPreparation:
    softmax, sampler = softmax_settings(config.ranking), None
    if softmax is not None:
        sampler = NegativeSampler(softmax, schema.num_items, schema.target_item)
    return BatchPreparation(
        content_settings(config.content),
        store,
        bank,
        vocabularies,
        ranks.group,
        negatives=sampler,
        seed=config.seed,
        outputs=None if em3.content is None else em3.content.outputs,
    )
