"""A sharding plan as text: the rank of each shard of each table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchrec.distributed.types import ShardingPlan

    from embeddings.tables import TableConfig


def format_plan(plan: ShardingPlan, tables: Sequence[TableConfig]) -> str:
    """Return the plan as a text table, one line per table.

    Example::

        from embeddings import TableConfig, build_embedding_collection, format_plan
        from embeddings import fuse_table_optimizers, plan_sharding

        tables = [TableConfig("item", 100, 4, ["item"])]
        model = build_embedding_collection(tables)
        fuse_table_optimizers(model, tables)
        print(format_plan(plan_sharding(model, tables), tables))
    """
    from embeddings.simulated_cluster import table_memory

    lines = [("table", "rows x dim", "MB", "sharding", "kernel", "shards (rank: rows x columns)")]
    for table in tables:
        memory = table_memory(table, plan)
        shards = ", ".join(f"{s.rank}: {s.rows} x {s.columns}" for s in memory.shards)
        size, megabytes = f"{table.num_embeddings} x {table.embedding_dim}", table.megabytes
        lines.append((table.name, size, f"{megabytes:.2f}", memory.sharding, memory.kernel, shards))
    return align_columns(lines)


def align_columns(lines: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as text with aligned columns and a rule under the first row."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (lines[0], rule, *lines[1:])
    )
