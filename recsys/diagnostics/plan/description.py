"""Describes a run on any cluster, without weights or devices: parameters, memory and plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from embeddings import format_plan
from embeddings.hardware import hardware_of
from embeddings.memory_bank import is_replicated
from embeddings.sharding import free_host_memory, table_parameters
from embeddings.simulated_cluster import DEVICES, Cluster, Device, RankTime
from embeddings.table_memory import FLOAT, TableMemory, table_memory
from recsys.config import Config, OptimizerSettings, content_settings
from recsys.data.batch_builder import BatchBuilder
from recsys.data.interactions import Interactions
from recsys.data.row_source import open_rows
from recsys.diagnostics.plan.meta_model import MetaModel, build_meta_model
from recsys.doctor import unusable_gpu
from recsys.model.em3 import EM3
from recsys.model.tables import pooled_features
from recsys.optimizer import count_state, dense_parameters

# By prefix of parameter names; the first match counts; `{}` is the modality.
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
    """One line of the list of parameters; bytes are of the rank that holds the most."""

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


def _table_part(memory: TableMemory) -> ModelPart:
    table, ranks = memory.table, sorted({shard.rank for shard in memory.shards})
    fullest = max(ranks, key=lambda rank: sum(memory.on_rank(rank)))
    weights, state = memory.on_rank(fullest)
    place = f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks"
    if table.kernel != "fused":
        place += ", in host memory"
    return ModelPart(
        name=f"table {table.name}",
        parameters=table.num_embeddings * table.embedding_dim,
        trained_by="nothing" if table.frozen else table.optimizer,
        where=f"{memory.sharding} on {place}",
        weight_bytes=weights,
        gradient_bytes=0,  # table gradients are applied in the backward, row by row
        state_bytes=state,
    )


def _dense_parts(em3: EM3, world_size: int, optimizer: OptimizerSettings) -> Iterator[ModelPart]:
    trained = dense_parameters(em3)
    state_sizes = count_state(optimizer, {name: part.shape for name, part in trained.items()})
    table_ids = {id(parameter) for _, parameter in table_parameters(em3)}
    sizes: Counter[tuple[str, bool]] = Counter()
    state: Counter[tuple[str, bool]] = Counter()
    for name, parameter in em3.named_parameters():
        if id(parameter) not in table_ids:
            key = part_of(name), name in trained
            sizes[key] += parameter.numel()
            state[key] += state_sizes.get(name, 0)
    copies = 1 if world_size == 1 else 2
    for (name, is_trained), size in sizes.items():
        yield ModelPart(
            name=name if is_trained else f"{name}, frozen",
            parameters=size,
            trained_by=optimizer.name if is_trained else "nothing",
            where="every rank",
            weight_bytes=FLOAT * size,
            gradient_bytes=FLOAT * size * copies * is_trained,
            state_bytes=FLOAT * state[name, is_trained],
        )


def _statistics_parts(em3: EM3) -> Iterator[ModelPart]:
    """Yield the statistics of items, which grow with these and which every rank holds whole."""
    if em3.neighbours is not None:
        buffers = (getattr(em3.neighbours, name) for name in em3.neighbours.item_row_buffers)
        size = sum(buffer.nbytes for buffer in buffers)
        yield ModelPart("statistics of neighbours", 0, "nothing", "every rank", size, 0, 0)


def part_of(name: str) -> str:
    """Return the part that a dense parameter belongs to, by its name in the model."""
    for prefix, part in DENSE_PARTS:
        if name.startswith(prefix):
            return part.format(name.removeprefix(prefix).split(".")[0])
    return "other"


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the rank that holds the most, without activations; the total omits `host_tables`."""

    tables: int
    dense: int
    bank: int
    limit: int
    host_tables: int = 0
    host_limit: int = 0

    @property
    def total(self) -> int:
        return self.tables + self.dense + self.bank


@dataclass(frozen=True)
class Description:
    """Everything that `recsys describe` prints; see `MetaModel`."""

    cluster: Cluster
    parts: list[ModelPart]
    table_bytes: list[int]  # by rank
    memory: RankMemory
    times: RankTime | None  # on GPUs
    plan: str
    problems: list[str]
    frozen_layers: dict[str, int]
    training_rows: int

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "world_size": self.cluster.world_size,
            "parameters": sum(part.parameters for part in self.parts),
        }


def describe(
    config: Config, data: str, cluster: Cluster, rows: dict[str, int] | None = None
) -> Description:
    """Describe a run on that cluster without starting it; unfitting data are a ValueError.

    A small sample of the data is enough. `rows` replaces the numbers of rows of tables, by column.
    """
    meta_model = build_meta_model(config, data, cluster, rows)
    em3, tables, plan = meta_model.em3, meta_model.tables, meta_model.plan
    memories = [table_memory(table, plan) for table in tables]
    parts = [
        *map(_table_part, memories),
        *_dense_parts(em3, cluster.world_size, config.optimizer),
        *_statistics_parts(em3),
    ]
    sharing = range(cluster.world_size // config.embedding.parallel.copies)
    table_bytes = [sum(memory.on_device_of(rank) for memory in memories) for rank in sharing]
    return Description(
        cluster=meta_model.cluster,
        parts=parts,
        table_bytes=table_bytes,
        memory=RankMemory(
            tables=max(table_bytes),
            dense=sum(part.bytes for part in parts if part.where == "every rank"),
            bank=_bank_bytes(meta_model),
            limit=cluster.device.memory_bytes,
            host_tables=max(
                sum(memory.on_host_of(rank) for memory in memories) for rank in sharing
            ),
            host_limit=cluster.device.host_memory_bytes,
        ),
        times=meta_model.times,
        plan=format_plan(plan, tables),
        problems=meta_model.problems,
        frozen_layers=meta_model.frozen_layers,
        training_rows=_read_a_batch(meta_model),
    )


def _bank_bytes(meta_model: MetaModel) -> int:
    branch, content = meta_model.em3.content, content_settings(meta_model.config.content)
    if branch is None or branch.bank is None or content is None:
        return 0
    rows, world_size = meta_model.schema.num_items, meta_model.cluster.world_size
    if not is_replicated(rows, branch.bank.dim, world_size, content.history.bank):
        rows = -(-rows // world_size)
    return FLOAT * rows * (branch.bank.dim + 1)


def _read_a_batch(meta_model: MetaModel) -> int:
    config, schema = meta_model.config, meta_model.schema
    rows = open_rows(config.source, meta_model.root, "train", schema, config.on_bad_row)
    content = content_settings(config.content)
    build = BatchBuilder(
        schema,
        pooled_features(config.embedding, schema),
        encode_history=content is not None and content.history.mode == "full",
        content_histories=[] if content is None else content.history.columns,
    )
    next(iter(Interactions(rows, build, config.batch_size, seed=config.seed)))
    return rows.num_rows


def parse_rows(words: list[str]) -> dict[str, int]:
    """Read TABLE=NUMBER from each word; another form is a ValueError."""
    rows = {}
    for word in words:
        name, _, number = word.partition("=")
        try:
            rows[name] = int(float(number.replace("_", "")))
        except ValueError as error:
            raise ValueError(
                f"rows: '{word}' is not TABLE=NUMBER; write for instance item=4000000000"
            ) from error
    return rows


def find_cluster(
    device: str,
    nodes: int = 1,
    ranks_per_node: int | None = None,
    memory_bytes: float | None = None,
) -> Cluster:
    """Return the cluster that the command line names; an unusable option is a ValueError.

    `device` is a name in `DEVICES`, or auto, cpu or cuda. The default of `memory_bytes` is that of
    the data sheet, else this machine's.
    """
    names = [*DEVICES, "cpu", "cuda", "auto"]
    if device not in names:
        raise ValueError(f"device '{device}' is unknown; choose one of {names}")
    if device == "auto":
        if (reason := unusable_gpu()) is not None:
            raise ValueError(
                f"device is auto, but torch cannot use this machine's GPU: {reason}; name the "
                f"device that is meant: {names[:-1]}"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is cuda, but no GPU is usable here; name the one that is meant: {[*DEVICES]}"
        )
    if ranks_per_node is None:
        ranks_per_node = torch.cuda.device_count() if device == "cuda" else 1
    for name, number in (("nodes", nodes), ("gpus_per_node", ranks_per_node)):
        if not 1 <= number <= 10_000:
            raise ValueError(f"{name} is {number}; give 1 to 10000")
    figures = DEVICES.get(device) or _this_machine(device, ranks_per_node)
    if memory_bytes is not None:
        if not memory_bytes > 0:
            raise ValueError(f"memory_bytes is {memory_bytes}; give a positive number")
        figures = replace(figures, memory_bytes=int(memory_bytes))
    return Cluster(nodes, ranks_per_node, figures)


def _this_machine(device: str, ranks_per_node: int) -> Device:
    share = free_host_memory() // ranks_per_node
    if device == "cpu":
        return Device("cpu of this machine", "cpu", share)
    properties = torch.cuda.get_device_properties(0)
    name, figures = f"{properties.name} of this machine", hardware_of(properties.name)
    return Device(name, "cuda", properties.total_memory, share, figures)
