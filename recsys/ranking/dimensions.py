"""Describes the inputs of a ranking model, as derived from the schema and the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch.distributed as dist
from torch import nn

from recsys.data.schema import Schema


@dataclass(frozen=True)
class InputDimensions:
    """Widths and names of a ranking model's inputs.

    pooled_dims: D of each pooled feature, then of each vector of extra sequences.
    id_dim: D of target and history items.
    further_histories: the last of `pooled_names`, which are extra sequences.
    group: the column of the user for whom items are ranked.
    num_items: rows of the target item's table; 0 if items change (bounded).
    item_categories: maps items [N] to categories [N, M]; set if a model searches by category.
    process_group: the ranks that train the model together; None for a single rank.
    """

    pooled_dims: list[int]
    id_dim: int
    num_dense: int
    num_parallel: int
    num_labels: int
    pooled_names: tuple[str, ...] = ()
    dense_names: tuple[str, ...] = ()
    parallel_names: tuple[str, ...] = ()
    further_histories: tuple[str, ...] = ()
    group: str = ""
    has_history: bool = True
    num_items: int = 0
    item_categories: nn.Module | None = None
    process_group: dist.ProcessGroup | None = None

    @staticmethod
    def of(
        schema: Schema,
        pooled_features: list[str],
        table_dims: dict[str, int],
        item_categories: nn.Module | None = None,
        process_group: dist.ProcessGroup | None = None,
        further: Mapping[str, int] = MappingProxyType({}),
    ) -> InputDimensions:
        """Return the dimensions of a dataset; `further` has widths of extra sequences by name."""
        pooled_dims = [table_dims[schema.table_of(name)] for name in pooled_features]
        return InputDimensions(
            pooled_dims=[*pooled_dims, *further.values()],
            id_dim=table_dims[schema.target_item],
            num_dense=len(schema.of_kind("dense")),
            num_parallel=len(schema.parallel),
            num_labels=len(schema.of_kind("label")),
            pooled_names=(*pooled_features, *further),
            dense_names=tuple(schema.of_kind("dense")),
            parallel_names=tuple(schema.parallel),
            further_histories=tuple(further),
            group=schema.group,
            has_history=schema.history is not None,
            num_items=0 if schema.has_bounded_items else schema.num_items,
            item_categories=item_categories,
            process_group=process_group,
        )
