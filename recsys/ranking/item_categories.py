"""Loads the categories of items from a column of their Parquet files.

SIM's search by category reads it.

Shapes: n rows of a chunk, I items with a category, C categories of the item that has most, N ids.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from recsys.config import RankingSettings
from recsys.data.filesystem import Location
from recsys.data.items.category_lists import category_lists
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.bad_rows import OnBadRow
from recsys.data.schema import Schema
from recsys.ranking.settings import SimSettings

MOST_CATEGORIES = 16  # of an item: each pair of two items' categories is compared


class ItemCategories(nn.Module):
    """Looks up the categories of items. Items without any take no memory."""

    items: Tensor
    categories: Tensor

    def __init__(
        self,
        items: Tensor,  # int64 [I], ascending
        categories: Tensor,  # [I, C]
    ) -> None:
        super().__init__()
        self.register_buffer("items", items, persistent=False)
        self.register_buffer("categories", categories, persistent=False)

    def forward(self, items: Tensor) -> Tensor:  # [N] -> [N, C]
        """Return numbers for the categories of each item, -1 for the ones it has less than C."""
        place = torch.searchsorted(self.items, items).clamp(max=len(self.items) - 1)
        is_known = (self.items[place] == items).unsqueeze(1)
        return torch.where(is_known, self.categories[place], -1)


def load_item_categories(
    settings: RankingSettings, root: Location, schema: Schema, on_bad_row: OnBadRow
) -> ItemCategories | None:
    """Return the categories of items, or None if no model searches by category.

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
    has_any = (numbers[items.rows] >= 0).any(axis=1)
    if not has_any.any():
        raise ValueError(f"{items.folder}: column '{name}' is null in every row")
    ids, rows = items.ids[has_any].astype(np.int64), items.rows[has_any]
    order = ids.argsort()
    return ItemCategories(torch.from_numpy(ids[order]), torch.from_numpy(numbers[rows[order]]))


def _lists(
    file: Location, row: int, values: pa.Array, name: str
) -> tuple[np.ndarray, pa.Array]:  # int64 [n], all categories
    """Return the number of categories of each row, and the categories of all rows."""
    lengths, categories = category_lists(values, f"{file}: column '{name}'")
    if (bad := lengths > MOST_CATEGORIES).any():
        place = int(bad.argmax())
        raise ValueError(
            f"{file}: column '{name}', row {row + place}: {lengths[place]} categories; write "
            f"at most {MOST_CATEGORIES} per item"
        )
    return lengths, categories
