"""Describe a run on any cluster, without weights or devices: parameters, memory and plan."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from torchrec.distributed.types import ShardingPlan

from embeddings import (
    MemoryBank,
    TableConfig,
    format_plan,
    fuse_table_optimizers,
    plan_sharding,
    sharders,
)
from embeddings.memory_bank import is_replicated
from embeddings.sharding import table_parameters
from embeddings.simulated_cluster import (
    FLOAT,
    Cluster,
    RankTime,
    TableMemory,
    memory_problems,
    slowest_rank,
    table_memory,
)
from recsys.config import Config, ModalitySettings, OptimizerSettings, content_settings
from recsys.content.encoders.build import Encoder, build_encoder
from recsys.content.kinds.feature import Feature
from recsys.data.batch_builder import BatchBuilder
from recsys.data.interactions import Interactions
from recsys.data.items.content_store import require_column
from recsys.data.items.item_table import FeatureFile
from recsys.data.items.item_values import feature_tokens
from recsys.data.items.kind import make_kind
from recsys.data.parquet.file import READ_ERRORS, column_type, mean_list_lengths, open_parquet
from recsys.data.parquet.values import list_lengths
from recsys.data.row_source import open_rows
from recsys.data.schema import Schema, load_schema
from recsys.kernels import refused_kernels
from recsys.model.build import build_em3
from recsys.model.em3 import EM3
from recsys.model.tables import check_placement, planner_hardware, pooled_features, table_configs
from recsys.optimizer.dense import count_state, dense_parameters
from recsys.storage.location import Location

NO_LIMIT = 2**60  # memory in bytes for a plan without a limit, more than any table needs
SAMPLED_ITEMS = 2048
# Parts by prefix of their parameters' names; the first match counts; `{}` is the modality.
DENSE_PARTS = (
    ("content.encoders.", "encoder {}"),
    ("content.projections.", "projections"),
    ("content.fusion.", "fusion"),
    ("content.history_map.", "history map"),
    ("content.", "content, other"),
    ("further_histories.", "further histories"),
    ("ranking.", "ranking"),
    ("losses.", "losses"),
)


@dataclass(frozen=True)
class ModelPart:
    """One line of the list of parameters, with bytes on the rank that holds the most."""

    name: str
    parameters: int  # total over all ranks
    trained_by: str
    where: str
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.state_bytes


def _table_part(memory: TableMemory, averages: int) -> ModelPart:
    table, ranks = memory.table, sorted({shard.rank for shard in memory.shards})
    fullest = max(ranks, key=lambda rank: sum(memory.bytes_on_rank(rank)))
    weights, state = memory.bytes_on_rank(fullest)
    location = f"{memory.sharding} on "
    location += f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks"
    if table.kernel != "fused":
        location += ", in host memory"
    size = table.num_embeddings * table.embedding_dim
    trainer = "nothing" if table.frozen else table.optimizer
    # Table gradients take no memory: the backward pass applies them row by row.
    state += averages * weights
    return ModelPart(f"table {table.name}", size, trainer, location, weights, 0, state)


def _dense_parts(em3: EM3, world_size: int, optimizer: OptimizerSettings) -> Iterator[ModelPart]:
    trained = dense_parameters(em3)
    state_sizes = count_state(optimizer, {name: weight.shape for name, weight in trained.items()})
    table_ids = {id(parameter) for _, parameter in table_parameters(em3)}
    sizes, state = Counter[tuple[str, bool]](), Counter[tuple[str, bool]]()
    for name, parameter in em3.named_parameters():
        if id(parameter) not in table_ids:
            key = part_of(name), name in trained
            sizes[key] += parameter.numel()
            state[key] += state_sizes.get(name, 0)
    copies = 1 if world_size == 1 else 2
    for (name, is_trained), size in sizes.items():
        title = name if is_trained else f"{name}, frozen"
        gradients, moments = size * copies * is_trained, state[name, is_trained]
        num_bytes = (FLOAT * number for number in (size, gradients, moments))
        trainer = optimizer.name if is_trained else "nothing"
        yield ModelPart(title, size, trainer, "every rank", *num_bytes)
    if em3.neighbours is not None:  # its statistics grow with the number of items
        buffers = (getattr(em3.neighbours, name) for name in em3.neighbours.item_row_buffers)
        size = sum(buffer.nbytes for buffer in buffers)
        yield ModelPart("statistics of neighbours", 0, "nothing", "every rank", size, 0, 0)


def part_of(name: str) -> str:
    """Return the part of the model that a dense parameter belongs to, by its name."""
    for prefix, part in DENSE_PARTS:
        if name.startswith(prefix):
            return part.format(name.removeprefix(prefix).split(".")[0])
    return "other"


def in_bytes(number: float) -> str:
    """Return bytes as text with three digits: 1,536 as 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.3g} {unit}"


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the rank that holds the most, without activations; `total` omits `host_tables`."""

    tables: int
    dense: int
    bank: int
    limit: int
    host_tables: int
    host_limit: int

    @property
    def total(self) -> int:
        return self.tables + self.dense + self.bank

    def problems(self) -> list[str]:
        """Return why all parts together do not fit, with a fix; empty if they fit."""
        if self.total <= self.limit:
            return []
        bank_fix = (
            "more ranks, a smaller content.dim, content.history.similarity_features false (no "
            "vectors of single modalities), or fewer rows for the item table"
        )
        size, name, fix = max(
            (self.tables, "tables", "more ranks, a smaller embedding.dim or fewer rows"),
            (self.dense, "dense parts", "smaller encoders, or fewer layers that train"),
            (self.bank, "the memory bank", bank_fix),
        )
        return [
            f"{in_bytes(self.total)} per rank of {in_bytes(self.limit)}; most is {name}, "
            f"{in_bytes(size)}: {fix}"
        ]


@dataclass(frozen=True)
class Description:
    """Everything that `recsys describe` prints."""

    cluster: Cluster
    parts: list[ModelPart]
    table_bytes: list[int]  # by rank
    memory: RankMemory
    times: RankTime | None  # TorchRec's estimate for a step's tables on GPUs; None on CPU
    plan: str
    # Why the run does not fit, with fixes; if tables do not, the plan is for unlimited memory.
    problems: list[str]
    frozen_layers: dict[str, int]  # by encoder, parameters that run only before training
    training_rows: int
    without_kernel: dict[str, str]  # by kernel, why PyTorch computes on CPU instead

    def to_json(self) -> dict[str, Any]:
        parameters = sum(part.parameters for part in self.parts)
        return asdict(self) | {"world_size": self.cluster.world_size, "parameters": parameters}


def describe(
    config: Config, data: str, cluster: Cluster, rows: dict[str, int] | None = None
) -> Description:
    """Describe a run on a cluster without starting it; unusable data are a ValueError.

    A small sample of the data is enough. `rows` replaces the tables' numbers of rows, by column.
    """
    root = Location.of(data)
    schema = load_schema(root)
    _resize(schema, rows or {})
    hardware = planner_hardware(config.embedding.hardware).or_else(cluster.device.hardware)
    cluster = replace(cluster, device=replace(cluster.device, hardware=hardware))
    device, world_size = cluster.device, cluster.world_size
    check_placement(config.embedding, schema, device.kind, world_size, cluster.ranks_per_node)
    tables = table_configs(config, schema, mean_list_lengths(root, schema))
    em3, frozen_layers = _meta_em3(config, root, schema, tables)
    plan, problems, times = _plan(config, em3, tables, cluster)
    memories = [table_memory(table, plan) for table in tables]
    averages = int(config.optimizer.ema_tables)  # copies of the tables on their devices
    parts = [_table_part(memory, averages) for memory in memories]
    parts += _dense_parts(em3, world_size, config.optimizer)
    is_native = device.kind == "cpu" and config.kernels != "torch"
    copy_ranks = range(world_size // config.embedding.parallel.copies)
    table_bytes = [
        sum(
            memory.bytes_on_device(rank) + averages * memory.bytes_on_rank(rank)[0]
            for memory in memories
        )
        for rank in copy_ranks
    ]
    host_bytes = [sum(memory.bytes_on_host(rank) for memory in memories) for rank in copy_ranks]
    memory = RankMemory(
        tables=max(table_bytes),
        dense=sum(part.bytes for part in parts if part.where == "every rank"),
        bank=_bank_bytes(config, em3, world_size),
        limit=device.memory_bytes,
        host_tables=max(host_bytes),
        host_limit=device.host_memory_bytes,
    )
    return Description(
        cluster,
        parts,
        table_bytes,
        memory,
        times,
        format_plan(plan, tables),
        problems or memory.problems(),
        frozen_layers,
        training_rows=_read_a_batch(config, root, schema),
        without_kernel=dict(refused_kernels(em3) if is_native else ()),
    )


def _bank_bytes(config: Config, em3: EM3, world_size: int) -> int:
    branch, content = em3.content, content_settings(config.content)
    if branch is None or branch.bank is None or content is None:
        return 0
    banks = [branch.bank] if branch.outputs is None else [branch.bank, branch.outputs.bank]
    num_bytes, items, placement = 0, branch.bank.num_items, content.history.bank
    for dim in (bank.dim for bank in banks):
        replicated = is_replicated(items, dim, world_size, placement)
        num_bytes += FLOAT * (items if replicated else -(-items // world_size)) * (dim + 1)
    return num_bytes


def _read_a_batch(config: Config, root: Location, schema: Schema) -> int:
    """Build one training batch, which raises for unusable data; return the number of rows."""
    rows = open_rows(config.source, root, "train", schema, config.on_bad_row)
    content = content_settings(config.content)
    build = BatchBuilder(
        schema,
        pooled_features(config.embedding, schema),
        encode_history=content is not None and content.history.mode == "full",
        content_histories=[] if content is None else content.history.columns,
    )
    next(iter(Interactions(rows, build, config.batch_size, seed=config.seed)))
    return rows.num_rows


def _meta_em3(
    config: Config, root: Location, schema: Schema, tables: list[TableConfig]
) -> tuple[EM3, dict[str, int]]:
    """Return the model without weights, and `frozen_layers`; reads a few items for widths."""
    content = content_settings(config.content)
    encoders, frozen_layers = {}, {}
    bank: MemoryBank | None = None
    if content is not None:
        widths = _feature_widths(root, schema, content.modalities)
        for name, modality in content.modalities.items():
            # A user-defined module may compute with its weights, so it cannot be on meta.
            with torch.device("cpu" if modality.module else "meta"):
                encoders[name] = build_encoder(name, modality, widths.get(name))
            if encoders[name].caches and modality.cache_frozen_layers:
                size = _num_parameters(encoders[name])
                encoders[name].drop_frozen_layers()
                frozen_layers[name] = size - _num_parameters(encoders[name])
        if content.history.mode != "full":
            bank = MemoryBank(schema.num_items, content.vector_dim, "meta")
    em3 = build_em3(config, schema, tables, encoders, bank)
    fuse_table_optimizers(em3, tables)
    return em3, frozen_layers


def _resize(schema: Schema, rows: dict[str, int]) -> None:
    for name, number in rows.items():
        column = schema.columns.get(name)
        if column is None or column.num_embeddings is None:
            tables = [n for n, c in schema.columns.items() if c.num_embeddings is not None]
            raise ValueError(f"rows: '{name}' has no table; the tables are {tables}")
        if number < 1:
            raise ValueError(f"rows: table '{name}' with {number} rows; give at least 1")
        column.num_embeddings = number


def _feature_widths(
    root: Location, schema: Schema, modalities: dict[str, ModalitySettings]
) -> dict[str, int]:
    """Return the widths of stored features; a ValueError for a column that training refuses."""
    folder = root / "items"
    if schema.items is None:
        raise ValueError(f"{root}/schema.yaml: a model with content needs `items`; add them")
    file = next(filter(_has_rows, folder.files(".parquet")), None)
    if file is None:
        raise ValueError(f"{folder}: no *.parquet files with rows; write one row per item there")
    widths = {}
    for name, modality in modalities.items():
        kind = make_kind(f"content.modalities.{name}", modality)
        require_column(schema.items, kind)
        if (stored := schema.items.columns[modality.column].file) is not None:
            widths[name] = FeatureFile(root / stored).width
            continue
        values, where = _first_values(file, modality.column), f"{file}: column '{modality.column}'"
        kind.lengths(values, where)  # raises if training would
        if isinstance(kind, Feature):
            _, tokens = feature_tokens(values, where)
            if len(tokens):
                widths[name] = int(list_lengths(tokens)[0])
    return widths


def _has_rows(file: Location) -> bool:
    with open_parquet(file) as parquet:
        return parquet.metadata.num_rows > 0


def _first_values(file: Location, column: str) -> pa.Array:
    try:
        with open_parquet(file, streaming=True) as parquet:
            column_type(parquet, file, column)
            return next(parquet.iter_batches(SAMPLED_ITEMS, columns=[column])).column(0)
    except READ_ERRORS as error:
        raise ValueError(f"{file}: column '{column}' cannot be read ({error})") from error


def _num_parameters(encoder: Encoder) -> int:
    return sum(parameter.numel() for parameter in encoder.parameters())


def _plan(
    config: Config, em3: EM3, tables: list[TableConfig], cluster: Cluster
) -> tuple[ShardingPlan, list[str], RankTime | None]:
    settings, batch_size, device = config.embedding, config.batch_size, cluster.device
    copies, senders = settings.parallel.copies, sharders(*astuple(settings.communication))

    def plan_on(target: Cluster) -> ShardingPlan:
        return plan_sharding(
            em3,
            tables,
            device=device.kind,
            batch_size=batch_size,
            topology=target.topology(copies),
            module_sharders=senders,
            prefetch=settings.prefetch,
            copies=copies,
            hardware=device.hardware,
        )

    problems: list[str] = []
    try:
        plan = plan_on(cluster)
    except ValueError as error:
        unlimited = replace(device, memory_bytes=NO_LIMIT, host_memory_bytes=NO_LIMIT)
        plan = plan_on(replace(cluster, device=unlimited))  # raises if memory is not the cause
        host_bytes = device.host_memory_bytes if device.kind == "cuda" else 0
        sizes = device.memory_bytes, cluster.world_size // copies, host_bytes
        problems = memory_problems(tables, *sizes, device.hardware.reserved_share)
        problems = problems or [str(error)]
    if device.kind == "cpu":
        return plan, problems, None
    topology = cluster.topology(copies)
    times = slowest_rank(em3, tables, plan, topology, senders, batch_size, settings.prefetch)
    return plan, problems, times
