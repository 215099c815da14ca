"""Lists the parts of a model: parameters, their optimizer, their ranks and their bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torchrec.distributed.types import ShardingPlan

from embeddings import TableConfig
from embeddings.sharding import table_parameters
from embeddings.table_memory import FLOAT, TableMemory, table_memory
from recsys.config import OptimizerSettings
from recsys.model.em3 import EM3
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


def model_parts(
    em3: EM3,
    tables: list[TableConfig],
    plan: ShardingPlan,
    world_size: int,
    optimizer: OptimizerSettings,
) -> list[ModelPart]:
    """Return the tables, then the dense parts; trained and frozen parameters are separate."""
    return [
        *(_table_part(table_memory(table, plan)) for table in tables),
        *_dense_parts(em3, world_size, optimizer),
    ]


def table_bytes_by_rank(
    tables: list[TableConfig], plan: ShardingPlan, world_size: int
) -> list[int]:
    """Return the bytes of all tables on each rank's device, of `world_size` that share a copy."""
    memories = [table_memory(table, plan) for table in tables]
    return [sum(memory.on_device_of(rank) for memory in memories) for rank in range(world_size)]


def host_table_bytes(tables: list[TableConfig], plan: ShardingPlan, world_size: int) -> int:
    """Return the most bytes that tables take of host memory beside a GPU."""
    memories = [table_memory(table, plan) for table in tables]
    return max(sum(memory.on_host_of(rank) for memory in memories) for rank in range(world_size))


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


def part_of(name: str) -> str:
    """Return the part that a dense parameter belongs to, by its name in the model."""
    for prefix, part in DENSE_PARTS:
        if name.startswith(prefix):
            return part.format(name.removeprefix(prefix).split(".")[0])
    return "other"
