"""Write a run's item vectors for TensorBoard's projector, with names and pictures of items.

Names, categories and small pictures come from the items' Parquet files.
Shapes: I chosen items, D ID dimension, E content dimension.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from recsys.build import Job
from recsys.checkpoint.reader import stored_tables
from recsys.checkpoint.run_folder import read_item_counts
from recsys.data.item_frequency import ItemCounts
from recsys.data.items.images import open_image
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.file import open_parquet
from recsys.data.parquet.values import is_list
from recsys.data.schema import read_schema
from recsys.storage.location import Location

CATEGORY_COLUMNS = ("genres", "genre", "category", "categories")  # default: the first existing one
NAME_COLUMNS = ("title", "name")
MAX_CHARACTERS = 60
PICTURE_SIZE = 48  # pixels


def item_files(root: Location) -> list[Location]:
    """Return the items' files of a dataset; none if its schema has no items."""
    return [] if read_schema(root).items is None else (root / "items").files(".parquet")


def item_table(job: Job) -> ItemTable | None:
    """Return the run's items; None if the dataset has no items' files."""
    if job.store is not None:
        return job.store.items
    if job.schema.items is None or not (job.root / "items").files(".parquet"):
        return None
    return ItemTable(job.root, job.schema, on_bad_row="skip")


def column_values(table: ItemTable, name: str, items: np.ndarray) -> list[Any]:
    """Return a column's values for items, int64 [I]; None for null and for items without a row."""
    rows_by_item = dict(zip(table.ids.tolist(), table.rows.tolist()))
    rows = [rows_by_item.get(item, -1) for item in items.tolist()]
    sorted_rows, first = np.array(sorted(set(rows) - {-1}), np.int64), 0
    values_by_row: dict[int, Any] = {}
    for _, _, chunk in table.chunks(name):
        inside = sorted_rows[(sorted_rows >= first) & (sorted_rows < first + len(chunk))]
        values_by_row.update(zip(inside.tolist(), _as_python(chunk.take(pa.array(inside - first)))))
        first += len(chunk)
    return [values_by_row.get(row) for row in rows]


def _as_python(values: pa.Array) -> list[Any]:
    """Return values as Python objects; replace bytes in texts that are not UTF-8."""
    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        encoded = values.cast(pa.large_binary()).to_pylist()
        return [None if text is None else text.decode(errors="replace") for text in encoded]


def column_types(files: Sequence[Location]) -> dict[str, pa.DataType]:
    """Return the types of columns that all items' files have, even columns not in the schema."""
    schemas: list[pa.Schema] = []
    for file in files:
        with open_parquet(file) as parquet:
            schemas.append(parquet.schema_arrow)
    common = [field for field in schemas[0] if all(field.name in other.names for other in schemas)]
    return {field.name: field.type for field in common}


def category_column(files: Sequence[Location], column: str | None) -> str | None:
    """Return the column to colour items by, `column` or a usual one; misuse is a ValueError."""
    if not files and column is not None:
        raise ValueError(
            f"--colour-by {column}: the dataset has no items with columns; leave the option out"
        )
    kinds = column_types(files) if files else {}
    if column is None:
        return next((name for name in CATEGORY_COLUMNS if _is_category(kinds.get(name))), None)
    if not _is_category(kinds.get(column)):
        usable = [name for name, kind in kinds.items() if _is_category(kind)]
        cause = f"is of type {kinds[column]}" if column in kinds else "is missing"
        raise ValueError(
            f"{files[0]}: column '{column}' {cause}; name by --colour-by one of texts or integers: "
            f"{usable}"
        )
    return column


def _is_category(kind: pa.DataType | None) -> bool:
    if kind is None:
        return False
    if pa.types.is_dictionary(kind) or is_list(kind):
        return _is_category(kind.value_type)
    texts = (pa.string(), pa.large_string(), pa.string_view())
    return pa.types.is_integer(kind) or kind in texts


def categories(table: ItemTable, name: str, items: np.ndarray) -> list[str | None]:  # [I] -> [I]
    """Return each item's category, the first of several in a list or separated by `|`, or None."""
    result: list[str | None] = []
    for value in column_values(table, name, items):
        several = value if isinstance(value, list) else [value]
        first = next((category for category in several if category is not None), None)
        text = "" if first is None else " ".join(str(first).split("|")[0].split())
        result.append(text or None)
    return result


def item_names(table: ItemTable | None, items: np.ndarray) -> list[str]:  # int64 [I] -> [I]
    """Return each item's title or name, or the beginning of its text, or its id."""
    if table is None:
        return [f"item {item}" for item in items.tolist()]
    kinds = column_types(table.files)
    texts = [name for name, column in table.items.columns.items() if column.kind == "text"]
    sources = [name for name in (*NAME_COLUMNS, *texts) if name in kinds]
    names: list[str] = [""] * len(items)
    for source in sources:
        values = column_values(table, source, items)
        names = [name or _beginning(value) for name, value in zip(names, values)]
    ids = column_values(table, table.items.id, items)
    ids = [row if identity is None else identity for identity, row in zip(ids, items.tolist())]
    return [name or f"{table.items.id} {identity}" for name, identity in zip(names, ids)]


def _beginning(value: Any) -> str:
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1].rstrip() + "…"


def item_pictures(table: ItemTable | None, items: np.ndarray) -> Tensor | None:
    """Return the first image of each item [I, 3, SIZE, SIZE], white without one.

    None if the schema has no images.
    """
    columns = table.items.columns if table is not None else {}
    source = next((name for name, column in columns.items() if column.kind == "image"), None)
    if table is None or source is None:
        return None
    return torch.stack([small_picture(value) for value in column_values(table, source, items)])


def small_picture(encoded: bytes | list[bytes | None] | None) -> Tensor:
    """Return an image, or the first of a list, scaled onto a white square: [3, SIZE, SIZE]."""
    size = PICTURE_SIZE
    square = Image.new("RGB", (size, size), "white")
    if isinstance(encoded, list):
        encoded = next((image for image in encoded if image is not None), None)
    if encoded is not None:
        with suppress(Exception):  # decoders may raise anything; training reports damaged images
            image = open_image(encoded)
            image.thumbnail(square.size)
            square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255


MAX_ITEMS, ITEMS_PER_CALL = 2000, 256
CONFIG = "projector_config.pbtxt"  # of TensorBoard's projector


def check_folder(folder: Path) -> None:
    """Raise a ValueError if a folder exists and is no projector, as it would be replaced."""
    if folder.exists() and not (folder / CONFIG).exists():
        raise ValueError(
            f"{folder}: is no projector of a report; move it away, or name another --out"
        )


def write_projector(
    folder: Path, job: Job, run: Path, table: ItemTable | None, category: str | None
) -> int:
    """Write vectors of the items most frequent in training; return their number. A collective.

    An earlier projector in `folder` is replaced. `category` is the column of `table` to colour by.
    """
    ranks = job.ranks
    with ranks.raise_on_all_ranks():
        counts = read_item_counts(run, job.schema.item_id_limit)
        items = frequent_items(job, counts)
    rows = table_rows(job, items)
    with ranks.raise_on_all_ranks():
        if ranks.is_first and len(items):
            vectors = item_vectors(job, run, items, rows)
            _write_embeddings(folder, vectors, items, counts, table, category)
    return len(items)


def _write_embeddings(
    folder: Path,
    vectors: dict[str, Tensor],
    items: np.ndarray,
    counts: ItemCounts,
    table: ItemTable | None,
    category: str | None,
) -> None:
    """Write vectors [I, D] of each kind, names, counts and pictures of items into `folder`."""
    columns = {
        "name": item_names(table, items),
        "impressions": [str(count) for count in counts.of(items).tolist()],
    }
    if table is not None and category is not None:
        title = f"item's {category}" if category in columns else category
        columns[title] = [value or "" for value in categories(table, category, items)]
    pictures = item_pictures(table, items)
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for kind, matrix in vectors.items():
            rows = [list(row) for row in zip(*columns.values())]
            writer.add_embedding(matrix, rows, pictures, tag=kind, metadata_header=[*columns])


def frequent_items(job: Job, counts: ItemCounts) -> np.ndarray:  # int64 [I]
    """Return the most frequent training items; of a model with content, only items with content."""
    items = counts.items
    if job.store is not None:
        items = np.intersect1d(items, job.store.items.ids)
    return items[np.argsort(-counts.of(items), kind="stable")][:MAX_ITEMS]


def table_rows(job: Job, items: np.ndarray) -> Tensor:  # int64 [I] -> int64 [I]
    """Return the rows of items in the table of IDs. A collective, as ranks share a bounded map."""
    rows = torch.from_numpy(items)
    if (find := job.vocabularies.find_items) is None:
        return rows
    rows = find(rows)
    return rows.where(rows >= 0, job.schema.num_items - 1)  # row of unknown ids


@torch.no_grad()
def item_vectors(job: Job, run: Path, items: np.ndarray, rows: Tensor) -> dict[str, Tensor]:
    """Return the best model's vectors of items [I], by kind, before and after the CIC loss's maps.

    `rows` are those of `table_rows`. With a content branch, all `items` must have content.
    """
    table = stored_tables(run / "checkpoints" / "best")[job.schema.target_item]
    ids = torch.cat([table.rows(row, row + 1) for row in rows.tolist()])
    branch, store = job.em3.content, job.store
    if branch is None or store is None:
        return {"ID": ids}
    branch.eval()
    device, content = job.ranks.device, []
    for chunk in np.split(items, range(ITEMS_PER_CALL, len(items), ITEMS_PER_CALL)):
        inputs = {name: tensor.to(device) for name, tensor in store.gather(chunk).items()}
        content.append(branch.encode(inputs)[:, : branch.dim].float().cpu())
    vectors = {"ID": ids, "content": torch.cat(content)}
    if (loss := job.em3.losses.contrastive) is not None:
        vectors["ID_after_CIC"] = loss.id_map(ids.to(device)).cpu()
        vectors["content_after_CIC"] = loss.content_map(vectors["content"].to(device)).cpu()
    return vectors
