"""Stores over a small dataset's items, which tests rewrite or add to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.config import ModalitySettings
from recsys.data.items.content_store import ContentStore
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.bad_rows import OnBadRow
from recsys.data.schema import load_schema
from recsys.storage.location import Location
from tests.datasets import write_parquet

TEXT = ModalitySettings(kind="text", column="text", encoder="random:bert", max_length=8)
POSTER = ModalitySettings(kind="image", column="poster", encoder="random:vit", image_size=8)
CLIP = ModalitySettings(kind="feature", column="clip")
MODALITIES = {"text": TEXT, "poster": POSTER, "clip": CLIP}


def table_of(dataset: Path, on_bad_row: OnBadRow = "error") -> ItemTable:
    root = Location.of(dataset)
    return ItemTable(root, load_schema(root), on_bad_row)


def store_of(dataset: Path, *names: str, on_bad_row: OnBadRow = "error") -> ContentStore:
    modalities = {name: MODALITIES[name] for name in names}
    store = ContentStore(table_of(dataset, on_bad_row), modalities, dataset.parent / "cache")
    for name in names:
        store.build(name)
    return store


def write_items(dataset: Path, **columns: pa.Array) -> Path:
    """Puts these columns into a second file of items with the ids 8 and on; its path."""
    count = len(next(iter(columns.values())))
    schema = dataset / "schema.yaml"
    schema.write_text(schema.read_text().replace("num_embeddings: 8", "num_embeddings: 20"))
    plain = {
        "item": pa.array(range(8, 8 + count)),
        "text": pa.nulls(count, pa.string()),
        "poster": pa.nulls(count, pa.binary()),
        "clip": pa.nulls(count, pa.list_(pa.float32())),
    }
    return write_parquet(dataset / "items" / "part-1.parquet", pa.table(plain | columns), 2)


def rewrite(dataset: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = dataset / "items" / "part-0.parquet"
    write_parquet(path, change(pq.read_table(path)))


def items_of(dataset: Path) -> dict[int, dict[str, Any]]:
    return {row["item"]: row for row in pq.read_table(dataset / "items").to_pylist()}
