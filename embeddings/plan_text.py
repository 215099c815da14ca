"""A sharding plan as text: where each table's shards live."""

from collections.abc import Sequence
from typing import Any

from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
)

from embeddings.tables import TableConfig


def format_plan(plan: ShardingPlan, tables: Sequence[TableConfig]) -> str:
    """The plan as a table to read: one line per table, in the order of the configuration."""
    sharding_of: dict[str, ParameterSharding] = {}
    for module_plan in plan.plan.values():
        assert isinstance(module_plan, EmbeddingModuleShardingPlan)
        sharding_of.update(module_plan)
    lines = [("table", "rows x dim", "MB", "sharding", "kernel", "shards (rank: rows x columns)")]
    for table in tables:
        sharding = sharding_of[table.name]
        spec: Any = sharding.sharding_spec
        pieces = [
            f"{piece.placement.rank()}: {piece.shard_sizes[0]} x {piece.shard_sizes[1]}"
            for piece in spec.shards
        ]
        lines.append(
            (
                table.name,
                f"{table.num_embeddings} x {table.embedding_dim}",
                f"{megabytes(table):.2f}",
                sharding.sharding_type,
                sharding.compute_kernel,
                ", ".join(pieces),
            )
        )
    return align_columns(lines)


def align_columns(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text with aligned columns, a rule under the first row."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = ["-" * width for width in widths]
    rows = [lines[0], rule, *lines[1:]]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def megabytes(table: TableConfig) -> float:
    """Of its weights."""
    return table.num_embeddings * table.embedding_dim * 4 / 2**20
