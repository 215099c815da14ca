"""A few steps of a small EM3 with every part in it: sharded on some ranks, and in plain PyTorch.

Text with LoRA and a stored feature, a history from the bank with its low-rank map, CIC against
all ranks, and tables of every kind. There is no dropout, so that all runs must agree.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from embeddings import (
    MemoryBank,
    TableConfig,
    build_embedding_bag_collection,
    build_embedding_collection,
)
from recsys.build import Job, build_job
from recsys.config import (
    Config,
    ContentSettings,
    ContrastiveSettings,
    EmbeddingSettings,
    FusionSettings,
    HistorySettings,
    LoraSettings,
    ModalitySettings,
    OptimizerSettings,
    content_settings,
)
from recsys.content.build import build_content_store
from recsys.data.batch import Batch
from recsys.data.batch_builder import BatchBuilder
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import Schema, load_schema
from recsys.data.vocabularies import UnknownIds
from recsys.distributed.ranks import Ranks
from recsys.model.build import build_em3
from recsys.model.em3 import EM3
from recsys.model.tables import pooled_features, table_configs
from recsys.ranking.attention_models import DinDcnSettings
from recsys.storage.location import Location
from tests.ranks import rank_device

STEPS, GLOBAL_BATCH = 3, 8
TABLES = ("user", "genres", "item")
# AdamW divides a gradient by its size: one that is rounding alone must not decide a step.
EPS = 1e-6
# Each differs, so that a parameter in the wrong group shows.
DENSE_RATES = {"content.encoders.": 4e-3, "content.": 2e-3, "losses.": 2e-3, "": 1e-3}
TABLE_RATES: dict[str, float] = {"sgd": 0.5, "adagrad": 0.05, "rowwise_adagrad": 0.05}


@dataclass
class Run:
    """What one rank saw in `STEPS` steps."""

    losses: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # [B of this rank, 1] per step
    gradients: list[dict[str, Tensor]] = field(default_factory=list)  # dense, per step
    dense: dict[str, Tensor] = field(default_factory=dict)  # trained, at the end
    tables: list[dict[str, list[tuple[list[int], Tensor]]]] = field(default_factory=list)
    # Shards of each table on this rank with their offsets, before each step and at the end.
    encoded: list[Tensor] = field(default_factory=list)  # items that this rank encoded, per step


def em3_config(
    folder: Path, sharding: Any = "row_wise", table_optimizer: Any = "sgd", **settings: Any
) -> Config:
    """The small EM3; `settings` replace fields of `Config`."""
    content = ContentSettings(
        modalities={
            "text": ModalitySettings(
                "text",
                "text",
                encoder="random:bert",
                training="lora",
                lora=LoraSettings(rank=2, top_layers=1),
                max_length=16,
            ),
            "clip": ModalitySettings("feature", "clip"),
        },
        dim=16,
        fusion=FusionSettings(num_heads=2, dropout=0.0),
        history=HistorySettings(lora_rank=2),
    )
    values: dict[str, Any] = {
        "tf32": False,  # results of GPUs are compared with those of a CPU
        "content": content,
        "embedding": EmbeddingSettings(
            dim=16,
            sharding=sharding,
            optimizer=table_optimizer,
            learning_rate=TABLE_RATES[table_optimizer],
            init_std=0.1,
        ),
        "ranking": DinDcnSettings(
            attention_units=[8], cross_layers=1, cross_rank=4, mlp_units=[8], dropout=0.0
        ),
        "contrastive": ContrastiveSettings(weight=0.5, dim=8, all_ranks=True),
        "optimizer": OptimizerSettings(
            learning_rate=DENSE_RATES[""],
            content_learning_rate=DENSE_RATES["content."],
            encoder_learning_rate=DENSE_RATES["content.encoders."],
            weight_decay=0.0,
            warmup_steps=1,
        ),
        "batch_size": GLOBAL_BATCH,
        "device": "cpu",
        "cache": str(folder / "cache"),
    }
    return Config(**(values | settings))


def ranks_of(rank: int, world_size: int) -> Ranks:
    """`Ranks` of a process that `run_on_ranks` started."""
    return Ranks(rank, world_size, rank, world_size, rank_device())


def rows_of_step(root: Location, schema: Schema, step: int, rank: int, world_size: int) -> pa.Table:
    """This rank's part of the step's global batch."""
    table = next(ParquetRows.of_split(root, "train", schema).read(0, STEPS * GLOBAL_BATCH))
    size = GLOBAL_BATCH // world_size
    return table.slice(step * GLOBAL_BATCH + rank * size, size)


def train_sharded(rank: int, world_size: int, folder: Path, cases: list[Any]) -> dict[Any, Run]:
    """`STEPS` steps for each case (sharding, table optimizer)."""
    configs = {case: em3_config(folder, *case) for case in cases}
    for config in configs.values():
        config.optimizer.options["eps"] = EPS
    return train_configs(rank, world_size, folder, configs)


def train_configs(
    rank: int, world_size: int, folder: Path, configs: dict[Any, Config]
) -> dict[Any, Run]:
    """`STEPS` steps of each configuration."""
    return {name: _train(rank, world_size, folder, config) for name, config in configs.items()}


def _train(rank: int, world_size: int, folder: Path, config: Config) -> Run:
    job = build_job(config, str(folder / "data"), ranks_of(rank, world_size))
    round_tables(table_weights(job))
    run = Run()
    for step in range(STEPS):
        run.tables.append(table_shards(job))
        rows = rows_of_step(job.root, job.schema, step, rank, world_size)
        loaded = iter([job.batch_builder()(rows)])
        (batch,) = job.preparation(loaded, UnknownIds(job.schema), step, training=True)
        batch = batch.to(job.ranks.device)
        run.encoded.append(batch.content.items)
        job.pipeline.update.optimizer.zero_grad()
        loss, (_, logits, _) = job.model(batch)
        loss.backward()
        _record(run, job.em3, loss, logits)
        job.pipeline.update.optimizer.step()
    run.tables.append(table_shards(job))
    trained = dense_weights(job.em3)
    run.dense = {name: trained[name] for name in run.gradients[0]}
    return run


def _record(run: Run, em3: EM3, loss: Tensor, logits: Tensor) -> None:
    run.losses.append(loss.detach().clone())
    run.logits.append(logits.detach().clone())
    run.gradients.append(dense_gradients(em3))


def dense_gradients(em3: EM3) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in em3.named_parameters()
        if parameter.grad is not None and not name.startswith("embedding")
    }


def dense_weights(em3: EM3) -> dict[str, Tensor]:
    return {
        name: value.detach().clone()
        for name, value in em3.named_parameters()
        if value.requires_grad and not name.startswith("embedding")
    }


def table_shards(job: Job) -> dict[str, list[tuple[list[int], Tensor]]]:
    """By table: offsets and weights of what lies on this rank."""
    return {
        name.split(".")[-2]: [
            (list(shard.metadata.shard_offsets), shard.tensor.detach().clone())
            for shard in value.local_shards()
        ]
        for name, value in job.model.state_dict().items()
        if isinstance(value, ShardedTensor)
    }


@torch.no_grad()
def round_tables(weights: Iterable[Tensor]) -> None:
    """Makes weights multiples of 2 ** -12, whose sums are exact in whatever order they are taken.

    A row-wise table adds up the ids of a list rank by rank, other shardings one after the other.
    """
    for weight in weights:
        weight.copy_((weight * 2**12).round() / 2**12)


def table_weights(job: Job) -> list[Tensor]:
    """The weights of all tables that lie on this rank, to be changed in place."""
    return [
        shard.tensor
        for value in job.model.state_dict().values()
        if isinstance(value, ShardedTensor)
        for shard in value.local_shards()
    ]


def full_table(runs: list[Run], step: int, name: str) -> Tensor:
    """A table before a step (`STEPS`: at the end) put together from all ranks, [rows, D]."""
    shards = [shard for run in runs for shard in run.tables[step][name]]
    rows = max(offset[0] + len(shard) for offset, shard in shards)
    columns = max(offset[1] + shard.shape[1] for offset, shard in shards)
    table = torch.full((rows, columns), float("nan"))
    for (row, column), shard in shards:
        table[row : row + shard.shape[0], column : column + shard.shape[1]] = shard
    return table


def train_unsharded(
    rank: int, world_size: int, folder: Path, cases: list[tuple[str, int]]
) -> dict[tuple[str, int], Run]:
    """The global batch without TorchRec's sharding, pipeline or fused optimizers, for each case
    (table optimizer, column shards that keep their own moments), on the host."""
    return {case: _train_unsharded(ranks_of(rank, world_size), folder, *case) for case in cases}


def _train_unsharded(ranks: Ranks, folder: Path, table_optimizer: str, column_shards: int) -> Run:
    config = em3_config(folder, table_optimizer=table_optimizer)
    root = Location.of(folder / "data")
    schema = load_schema(root)
    tables = table_configs(config, schema)
    em3, build = _plain_em3(config, root, schema, tables, ranks)
    weights = _table_weights(em3)
    round_tables(weights.values())
    moments = {name: torch.zeros(len(value), column_shards) for name, value in weights.items()}
    adamw = torch.optim.AdamW(_dense_groups(em3), weight_decay=0.0, eps=EPS)
    run = Run()
    for step in range(STEPS):
        run.tables.append(_full_shards(weights))
        em3.zero_grad()
        loss, (_, logits, _) = em3(build(rows_of_step(root, schema, step, 0, 1)))
        loss.backward()
        _record(run, em3, loss, logits)
        adamw.step()
        for name, weight in weights.items():
            _update_table(weight, moments[name], table_optimizer)
    run.tables.append(_full_shards(weights))
    run.dense = dense_weights(em3)
    return run


def _plain_em3(
    config: Config, root: Location, schema: Schema, tables: list[TableConfig], ranks: Ranks
) -> tuple[EM3, BatchBuilder]:
    torch.manual_seed(config.seed)
    content = content_settings(config.content)
    assert content is not None
    store, encoders = build_content_store(content, root, schema, ranks, config.cache)
    bank = MemoryBank(schema.num_items, content.vector_dim, "cpu")
    em3 = build_em3(config, schema, tables, encoders, bank)
    # Only now, as TorchRec draws numbers before it calls our initialisation, which draws none.
    # A GPU draws other numbers.
    bags = build_embedding_bag_collection(tables, ranks.device)
    embeddings = build_embedding_collection(tables, ranks.device)
    assert bags is not None and embeddings is not None
    em3.embedding_bags, em3.embeddings = bags.cpu(), embeddings.cpu()
    return em3, BatchBuilder(schema, pooled_features(config.embedding, schema), store)


def _table_weights(em3: EM3) -> dict[str, torch.nn.Parameter]:
    assert em3.embedding_bags is not None
    holders = {**em3.embedding_bags.embedding_bags, **em3.embeddings.embeddings}
    return {name: holder.weight for name, holder in holders.items()}


def _full_shards(weights: dict[str, torch.nn.Parameter]) -> dict[str, Any]:
    return {name: [([0, 0], weight.detach().clone())] for name, weight in weights.items()}


def _dense_groups(em3: EM3) -> list[dict[str, Any]]:
    groups: dict[str, list[torch.nn.Parameter]] = {prefix: [] for prefix in DENSE_RATES}
    for name, parameter in em3.named_parameters():
        if parameter.requires_grad and not name.startswith("embedding"):
            groups[next(prefix for prefix in groups if name.startswith(prefix))].append(parameter)
    return [{"params": group, "lr": DENSE_RATES[prefix]} for prefix, group in groups.items()]


@torch.no_grad()
def _update_table(weight: torch.nn.Parameter, moment: Tensor, table_optimizer: str) -> None:
    gradient = weight.grad
    assert gradient is not None
    rate = TABLE_RATES[table_optimizer]
    if table_optimizer == "sgd":
        weight.sub_(rate * gradient)
        return
    blocks = gradient.view(len(weight), moment.shape[1], -1)  # [rows, column shards, columns]
    moment += (blocks**2).mean(dim=2)
    weight.sub_((rate * blocks / (moment.sqrt()[:, :, None] + 1e-8)).reshape(weight.shape))


def batches_of(job: Job, count: int, size: int) -> list[Batch]:
    """The first batches of the training split, of `size` rows each, for this rank."""
    table = next(ParquetRows.of_split(job.root, "train", job.schema).read(0, 60))
    share = table.slice(job.ranks.rank * count * size, count * size)
    return [job.batch_builder()(share.slice(index * size, size)) for index in range(count)]
