"""Loads the categories of every item from a column of the items' Parquet files.

SIM's search by category reads it.

Shapes: n rows of a chunk, C categories of the item that has most.
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
from recsys.data.parquet.values import is_list, list_lengths
from recsys.data.schema import Schema
from recsys.ranking.settings import SimSettings

MOST_CATEGORIES = 16  # of an item: each pair of two items' categories is compared


def load_item_categories(
    settings: RankingSettings, root: Location, schema: Schema, on_bad_row: OnBadRow
) -> Tensor | None:  # int32 [num_items, C]
    """Return numbers for the categories of each item, or None if no model searches by category.

    An item with fewer than C categories has -1 for the others.

    Args:
        settings: settings of the ranking model.
        root: folder of the dataset.
        schema: its columns.
        on_bad_row: raise or skip on an invalid row.

    Raises:
        ValueError: `ranking.search` is category, but `ranking.category` names no column of that
            kind, an item has more than 16 categories, or no item has any.
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
    lists = [_lists(*chunk, name) for chunk in items.chunks(name)]
    lengths = np.concatenate([lengths for lengths, _ in lists])
    values = pa.chunked_array([values for _, values in lists]).combine_chunks()
    codes = values.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    numbers = np.full((items.num_rows, max(1, int(lengths.max()))), -1, np.int32)
    numbers[np.arange(numbers.shape[1]) < lengths[:, None]] = codes
    categories = np.full((schema.num_items, numbers.shape[1]), -1, np.int32)
    categories[items.ids] = numbers[items.rows]
    if categories.max() < 0:
        raise ValueError(f"{items.folder}: column '{name}' is null in every row")
    return torch.from_numpy(categories)


def _lists(
    file: Location, row: int, values: pa.Array, name: str
) -> tuple[np.ndarray, pa.Array]:  # int64 [n], all categories
    """Return the number of categories of each row, and the categories of all rows.

    Raises:
        ValueError: the column has another type, or a row has too many categories.
    """
    several = is_list(values.type)
    kind = values.type.value_type if several else values.type
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)
    ):
        raise ValueError(
            f"{file}: column '{name}' of kind category has type {values.type}, expected integer or "
            "string, or a list of them"
        )
    if not several:
        return np.ones(len(values), np.int64), values
    lengths = list_lengths(values).astype(np.int64)
    if (bad := lengths > MOST_CATEGORIES).any():
        place = int(bad.argmax())
        raise ValueError(
            f"{file}: column '{name}', row {row + place}: {lengths[place]} categories; write "
            f"at most {MOST_CATEGORIES} per item"
        )
    return lengths, values.flatten()
