"""Loads the category of every item from a column of the items' Parquet files.

SIM's search by category reads it.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recsys.config import RankingSettings
from recsys.data.filesystem import Location
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.bad_rows import OnBadRow
from recsys.data.schema import Schema
from recsys.ranking.settings import SimSettings


def load_item_categories(
    settings: RankingSettings, root: Location, schema: Schema, on_bad_row: OnBadRow
) -> Tensor | None:  # int32 [num_items]
    """Return a number for the category of each item, or None if no model searches by category.

    An item without a category has -1.

    Args:
        settings: settings of the ranking model.
        root: folder of the dataset.
        schema: its columns.
        on_bad_row: raise or skip on an invalid row.

    Raises:
        ValueError: `ranking.search` is category, but `ranking.category` names no column of that
            kind, or no item has a category.
    """
    if not isinstance(settings, SimSettings) or settings.search != "category":
        return None
    columns = schema.items.columns if schema.items is not None else {}
    known = [name for name, column in columns.items() if column.kind == "category"]
    name = settings.category
    if name not in known:
        raise ValueError(
            f"ranking.category is '{name}', but ranking.search category reads an item column of "
            f"kind category; schema.yaml has {known}"
        )
    items = ItemTable(root, schema, on_bad_row)
    values = pa.chunked_array([_checked(*chunk, name) for chunk in items.chunks(name)])
    codes = values.combine_chunks().dictionary_encode().indices.fill_null(-1)
    numbers = codes.to_numpy(zero_copy_only=False)
    categories = np.full(schema.num_items, -1, np.int32)
    categories[items.ids] = numbers[items.rows]
    if categories.max() < 0:
        raise ValueError(f"{items.folder}: column '{name}' is null in every row")
    return torch.from_numpy(categories)


def _checked(file: Location, row: int, values: pa.Array, name: str) -> pa.Array:
    is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    if not is_text and not pa.types.is_integer(values.type):
        raise ValueError(
            f"{file}: column '{name}' of kind category has type {values.type}, expected integer or "
            "string; write one category per item"
        )
    return values
