"""Describes items for readers: names, categories and small pictures.

Shapes: I chosen items.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from recsys.data.filesystem import Location
from recsys.data.items.images import open_image
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.values import is_list
from recsys.diagnostics.run_report.item_columns import column_types, column_values

CATEGORY_COLUMNS = ("genres", "genre", "category", "categories")  # default: the first there is
NAME_COLUMNS = ("title", "name")
MOST_CHARACTERS = 60
PICTURE_SIZE = (160, 96)  # at most, in pixels: width and height


def category_column(files: Sequence[Location], chosen: str | None) -> str | None:
    """Return the column that colours the maps: the chosen one, or the first of the usual ones.

    `files` are those of the items, if the dataset has any.

    Raises:
        ValueError: the chosen column is missing, or is neither of texts nor of integers.
    """
    if not files:
        if chosen is None:
            return None
        raise ValueError(
            f"--colour_by {chosen}: the dataset has no items with columns; leave the option out"
        )
    kinds = column_types(files)
    if chosen is None:
        return next((name for name in CATEGORY_COLUMNS if _is_category(kinds.get(name))), None)
    if not _is_category(kinds.get(chosen)):
        usable = [name for name, kind in kinds.items() if _is_category(kind)]
        cause = f"is of type {kinds[chosen]}" if chosen in kinds else "is missing"
        raise ValueError(
            f"{files[0]}: column '{chosen}' {cause}; name by --colour_by one of texts or integers: "
            f"{usable}"
        )
    return chosen


def _is_category(kind: pa.DataType | None) -> bool:
    if kind is None:
        return False
    if pa.types.is_dictionary(kind) or is_list(kind):
        return _is_category(kind.value_type)
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return pa.types.is_integer(kind) or any(is_kind(kind) for is_kind in texts)


def categories(
    table: ItemTable,
    name: str,
    items: np.ndarray,  # int64 [I]
) -> list[str | None]:  # [I]
    """Return the category of each item: the first of several in a list or separated by `|`."""
    return [first_category(value) for value in column_values(table, name, items)]


def first_category(value: Any) -> str | None:
    """Return the first of several categories; None if there is none.

    Example::

        first_category("Comedy|Drama")  # "Comedy"
    """
    if isinstance(value, list):
        value = value[0] if value else None
    first = "" if value is None else str(value).split("|")[0].strip()
    return first or None


def category_text(value: Any) -> str:
    """Return all categories of an item as text; empty if it has none."""
    text = "" if value is None else str(value)
    values = value if isinstance(value, list) else text.split("|")
    return _beginning(", ".join(str(part) for part in values if part is not None))


def item_names(table: ItemTable | None, items: np.ndarray) -> list[str]:  # int64 [I] -> [I]
    """Return each item's title or name, else the beginning of its text, else its id."""
    if table is None:
        return [f"item {item}" for item in items.tolist()]
    kinds = column_types(table.files)
    texts = [name for name, column in table.items.columns.items() if column.kind == "text"]
    sources = [name for name in (*NAME_COLUMNS, *texts) if name in kinds]
    called: list[str] = [""] * len(items)
    for source in sources:
        values = column_values(table, source, items)
        called = [known or _beginning(value) for known, value in zip(called, values)]
    ids = column_values(table, table.items.id, items)
    rows = items.tolist()
    return [
        known or f"{table.items.id} {row if identity is None else identity}"
        for known, identity, row in zip(called, ids, rows)
    ]


def _beginning(value: Any) -> str:
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1].rstrip() + "…"


def item_pictures(
    table: ItemTable | None,
    items: np.ndarray,  # int64 [I]
) -> list[bytes | None]:  # [I]
    """Return the (first) image of each item as a small JPEG.

    Empty if an item has no readable image; None for all items if the schema has no images.
    """
    columns = table.items.columns if table is not None else {}
    source = next((name for name, column in columns.items() if column.kind == "image"), None)
    if table is None or source is None:
        return [None] * len(items)
    return [small_picture(value) for value in column_values(table, source, items)]


def small_picture(encoded: bytes | list[bytes | None] | None) -> bytes:
    """Return an image, or the first of a list, as a JPEG at most 96 pixels high.

    Empty if there is no image or it cannot be read.
    """
    if isinstance(encoded, list):
        encoded = next((image for image in encoded if image is not None), None)
    if encoded is None:
        return b""
    try:
        image = open_image(encoded)
    except Exception:  # decoders may raise anything on damaged bytes; training reported it
        return b""
    image.thumbnail(PICTURE_SIZE, Image.Resampling.LANCZOS)
    output = BytesIO()
    image.save(output, "JPEG", quality=85)
    return output.getvalue()
