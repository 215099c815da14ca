"""Synthetic datasets for measuring speed: given sizes, random labels.

Items are drawn log-uniformly (Zipf's law with exponent 1), as in real logs. Popularity ranks are
assigned to ids at random. Shapes: I items, N values of a column.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_GROUP = 32_768
ITEMS_PER_GROUP = 10_000
TAGS_PER_ROW = 3


@dataclass(frozen=True)
class DatasetSize:
    """Sizes and distributions of a synthetic dataset."""

    num_rows: int = 131_072  # training impressions
    num_items: int = 100_000
    num_users: int = 100_000
    num_tags: int = 1_000  # ids of a pooled list, three per row
    history: int = 50  # items in the history of each row
    jagged: bool = False  # histories of 0 to `history` items instead, evenly
    uniform: bool = False  # items drawn evenly instead of by Zipf's law
    text_dim: int = 384  # stored features; 0: none
    image_dim: int = 1280
    words: int = 0  # words of raw text per item; 0: none


SCHEMA = """\
target_item: item
group: user
columns:
  user:          {{kind: id, num_embeddings: {num_users}}}
  item:          {{kind: id, num_embeddings: {num_items}}}
  history:       {{kind: sequence, shares: item, parallel: [history_liked]}}
  tags:          {{kind: ids, num_embeddings: {num_tags}}}
  hour:          {{kind: dense}}
  liked:         {{kind: label}}
items:
  id: item
  columns:
"""


def write_dataset(
    folder: Path, size: DatasetSize, seed: int = 0, shared_items: Path | None = None
) -> Path:
    """Write the dataset unless it is there; share the files of equal items in `shared_items`."""
    size_file = folder / "size.json"
    identity = json.dumps([asdict(size), seed])
    if size_file.is_file() and size_file.read_text() == identity:
        return folder
    rng = np.random.default_rng(seed)
    popularity = rng.permutation(size.num_items)  # [I], id of each rank
    small = min(size.num_rows, 4096)
    for split, rows in (("train", size.num_rows), ("valid", small), ("test", small)):
        _write_rows(folder / split, rows, size, popularity, rng)
    if shared_items is None:
        _write_items(folder / "items", size, rng)
    else:
        _link_items(folder / "items", shared_items, size, seed)
    columns = ""
    for name, dim in (("text", size.text_dim), ("image", size.image_dim)):
        columns += f"    {name}: {{kind: feature}}\n" if dim else ""
    columns += "    title: {kind: text}\n" if size.words else ""
    (folder / "schema.yaml").write_text(SCHEMA.format(**asdict(size)) + columns)
    size_file.write_text(identity)
    return folder


def _draw_items(
    count: int,
    size: DatasetSize,
    popularity: np.ndarray,  # [I]
    rng: np.random.Generator,
) -> np.ndarray:  # [count]
    if size.uniform:
        return rng.integers(size.num_items, size=count)
    ranks = np.exp(rng.random(count) * np.log(size.num_items + 1)).astype(np.int64) - 1
    return popularity[ranks.clip(0, size.num_items - 1)]


def _lists(
    lengths: np.ndarray,  # [rows]
    values: np.ndarray,  # [N]
) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _write_rows(
    folder: Path,
    rows: int,
    size: DatasetSize,
    popularity: np.ndarray,  # [I]
    rng: np.random.Generator,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    writer: pq.ParquetWriter | None = None
    for start in range(0, rows, ROWS_PER_GROUP):
        count = min(ROWS_PER_GROUP, rows - start)
        lengths = np.full(count, size.history)
        if size.jagged:
            lengths = rng.integers(size.history + 1, size=count)
        total = int(lengths.sum())
        tags = rng.integers(size.num_tags, size=count * TAGS_PER_ROW)
        table = pa.table(
            {
                "user": rng.integers(size.num_users, size=count),
                "item": _draw_items(count, size, popularity, rng),
                "history": _lists(lengths, _draw_items(total, size, popularity, rng)),
                "history_liked": _lists(lengths, rng.integers(2, size=total).astype(np.float32)),
                "tags": _lists(np.full(count, TAGS_PER_ROW), tags),
                "hour": rng.random(count).astype(np.float32),
                "liked": rng.integers(2, size=count).astype(np.float32),
            }
        )
        writer = writer or pq.ParquetWriter(folder / "part-0.parquet", table.schema)
        writer.write_table(table, row_group_size=count)
    assert writer is not None
    writer.close()


def _link_items(folder: Path, shared: Path, size: DatasetSize, seed: int) -> None:
    fields = (seed, size.num_items, size.text_dim, size.image_dim, size.words)
    source = shared / "-".join(map(str, fields))
    if not (source / "part-0.parquet").exists():
        _write_items(source, size, np.random.default_rng(seed))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "part-0.parquet").unlink(missing_ok=True)
    (folder / "part-0.parquet").hardlink_to(source / "part-0.parquet")


def _write_items(folder: Path, size: DatasetSize, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = np.array([f"word{number}" for number in range(2000)])
    writer: pq.ParquetWriter | None = None
    for start in range(0, size.num_items, ITEMS_PER_GROUP):
        count = min(ITEMS_PER_GROUP, size.num_items - start)
        columns: dict[str, pa.Array] = {"item": pa.array(np.arange(start, start + count))}
        for name, width in (("text", size.text_dim), ("image", size.image_dim)):
            if width:
                flat = pa.array(rng.standard_normal(count * width, dtype=np.float32))
                columns[name] = pa.FixedSizeListArray.from_arrays(flat, width)
        if size.words:
            title_words = vocabulary[rng.integers(len(vocabulary), size=(count, size.words))]
            columns["title"] = pa.array([" ".join(row) for row in title_words])
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(folder / "part-0.parquet", table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
