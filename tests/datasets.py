"""A small synthetic dataset in the product's format, the same for the same seed.

It has every column kind, null lists and items without text, image or feature; the train split
lies in two files of several row groups each, so that nothing may rest on there being one.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NUM_GENRES = 5
FEATURE_WIDTH = 6
MAX_HISTORY = 4

SCHEMA = """\
target_item: item
group: user
columns:
  user:    {{kind: id, num_embeddings: {num_users}}}
  item:    {{kind: id, num_embeddings: {num_items}}}
  history: {{kind: sequence, shares: item, parallel: [history_liked]}}
  genres:  {{kind: ids, num_embeddings: {num_genres}}}
  price:   {{kind: dense}}
  liked:   {{kind: label}}
items:
  id: item
  columns:
    text:   {{kind: text}}
    poster: {{kind: image}}
    clip:   {{kind: feature}}
"""


def write_dataset(
    folder: Path,
    num_rows: dict[str, int] | None = None,
    num_users: int = 10,
    num_items: int = 30,
    seed: int = 0,
) -> Path:
    """Writes `folder` with schema.yaml, the splits of `num_rows` and items; returns `folder`.

    Item 0 has no text, item 1 an empty text and no poster, item 2 no clip. Whether an impression is
    liked depends on user and item, so that a model can learn it.
    """
    if num_rows is None:
        num_rows = {"train": 60, "valid": 24, "test": 20}
    folder.mkdir(parents=True, exist_ok=True)
    text = SCHEMA.format(num_users=num_users, num_items=num_items, num_genres=NUM_GENRES)
    (folder / "schema.yaml").write_text(text)
    for number, (split, count) in enumerate(num_rows.items()):
        rng = np.random.default_rng((seed, number))
        table = impressions(count, num_users, num_items, rng)
        half = count // 2 if split == "train" and count > 1 else count
        halves = [table.slice(0, half), table.slice(half)]
        for index, rows in enumerate(rows for rows in halves if rows.num_rows):
            write_parquet(folder / split / f"part-{index}.parquet", rows, row_group_size=11)
    items = item_rows(num_items, np.random.default_rng((seed, 100)))
    write_parquet(folder / "items" / "part-0.parquet", items, row_group_size=7)
    return folder


def write_parquet(path: Path, table: pa.Table, row_group_size: int | None = None) -> Path:
    """Writes one file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def impressions(
    num_rows: int, num_users: int, num_items: int, rng: np.random.Generator
) -> pa.Table:
    """Impressions with all columns of the schema; some lists are null, some empty."""
    users = rng.integers(num_users, size=num_rows)
    items = rng.integers(num_items, size=num_rows)
    lengths = rng.integers(MAX_HISTORY + 1, size=num_rows)
    history = [rng.integers(num_items, size=length).tolist() for length in lengths]
    liked = [rng.integers(2, size=length).astype(float).tolist() for length in lengths]
    genres = [
        rng.integers(NUM_GENRES, size=size).tolist() for size in rng.integers(4, size=num_rows)
    ]
    without_history = rng.random(num_rows) < 0.1
    return pa.table(
        {
            "user": pa.array(users, pa.int64()),
            "item": pa.array(items, pa.int64()),
            "history": pa.array(
                [None if no else row for no, row in zip(without_history, history)],
                pa.list_(pa.int64()),
            ),
            "history_liked": pa.array(
                [None if no else row for no, row in zip(without_history, liked)],
                pa.list_(pa.float32()),
            ),
            "genres": pa.array(genres, pa.list_(pa.int64())),
            "price": pa.array(rng.random(num_rows), pa.float32()),
            "liked": pa.array((users + items) % 2, pa.float32()),
        }
    )


def item_rows(num_items: int, rng: np.random.Generator) -> pa.Table:
    """Items in an order of their own; see `write_dataset` for what is missing."""
    ids = rng.permutation(num_items)
    vocabulary = ["red", "green", "blue", "car", "tree", "house"]
    texts: dict[int, str | None] = {
        item: " ".join(rng.choice(vocabulary, size=rng.integers(1, 5))) for item in range(num_items)
    }
    texts.update({0: None, 1: ""})
    posters: dict[int, bytes | None] = {item: png(rng) for item in range(num_items)}
    posters[1] = None
    clips: dict[int, list[float] | None] = {
        item: rng.random(FEATURE_WIDTH).tolist() for item in range(num_items)
    }
    clips[2] = None
    return pa.table(
        {
            "item": pa.array(ids, pa.int64()),
            "text": pa.array([texts[item] for item in ids], pa.string()),
            "poster": pa.array([posters[item] for item in ids], pa.binary()),
            "clip": pa.array([clips[item] for item in ids], pa.list_(pa.float32())),
        }
    )


def png(rng: np.random.Generator, width: int = 12, height: int = 10) -> bytes:
    """Random pixels as an encoded image."""
    buffer = BytesIO()
    pixels = rng.integers(256, size=(height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
