"""Bad items, encoders and schemas: what is done to a good dataset, and what the error must say."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.datasets import FEATURE_WIDTH, png, write_parquet
from tests.recsys.data.bad_impressions import BadInput, Spoil

FILE = "items/part-1.parquet"
TEXT: tuple[str, ...] = ()  # of the recipe
POSTER = (
    "--content.modalities",
    "{poster: {kind: image, column: poster, encoder: 'random:vit', image_size: 32}}",
)
CLIP = ("--content.modalities", "{clip: {kind: feature, column: clip}}")


def items(**columns: pa.Array) -> Spoil:
    """A second file with the items 30 to 33 and these columns; the table has room for 34."""

    def spoil(data: Path) -> None:
        schema = data / "schema.yaml"
        schema.write_text(schema.read_text().replace("num_embeddings: 30", "num_embeddings: 34"))
        count = len(next(iter(columns.values())))
        plain = {
            "item": pa.array(range(30, 30 + count)),
            "text": pa.nulls(count, pa.string()),
            "poster": pa.nulls(count, pa.binary()),
            "clip": pa.nulls(count, pa.list_(pa.float32())),
        }
        write_parquet(data / FILE, pa.table(plain | columns), 2)

    return spoil


def all_items(change: Callable[[pa.Table], pa.Table]) -> Spoil:
    """The one file of items, changed."""
    file = "items/part-0.parquet"
    return lambda data: write_parquet(data / file, change(pq.read_table(data / file)), 7)


def nulls(name: str) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        index = table.column_names.index(name)
        kind = table.schema.field(name).type
        return table.set_column(index, name, pa.nulls(len(table), kind))

    return change


def not_utf8(text: bytes) -> pa.Array:
    """A string column whose last value is no text."""
    raw = pa.array([b"good", None, text], pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


def posters(*last: bytes) -> Spoil:
    good = png(np.random.default_rng(0))
    return items(poster=pa.array([good, None, good, *last]))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says so, of few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*chunk_fields) for chunk_fields in chunks)


def clips(last: Any) -> Spoil:
    good = [1.0] * FEATURE_WIDTH
    return items(clip=pa.array([good, None, good, last], pa.list_(pa.float32())))


POSTER_3 = f"{FILE}: column 'poster', row 3: "
CLIP_3 = f"{FILE}: column 'clip', row 3: "

ITEMS = {
    "no items": BadInput(
        lambda data: (data / "items" / "part-0.parquet").unlink(),
        ["items: no *.parquet"],
        TEXT,
    ),
    "column missing": BadInput(
        all_items(lambda table: table.drop_columns(["text"])), ["column 'text' is missing"], TEXT
    ),
    "item twice": BadInput(
        items(item=pa.array([30, 31, 30])),
        [f"{FILE}: column 'item', row 2: item 30 "],
        TEXT,
    ),
    "item without id": BadInput(
        items(item=pa.array([30, None])), [f"{FILE}: column 'item', row 1: null"], TEXT
    ),
    "numbers as text": BadInput(
        items(text=pa.array([3])), [f"{FILE}: column 'text'", "int64", "string"], TEXT
    ),
    "text that is not UTF-8": BadInput(
        items(text=not_utf8(b"caf\xe9")), [f"{FILE}: column 'text', row 2: ", "0xe9"], TEXT
    ),
    "no item has a text": BadInput(all_items(nulls("text")), ["items: column 'text' "], TEXT),
    "decompression bomb": BadInput(
        posters(png_of_size(10_000, 10_000)),
        [POSTER_3, "100000000 pixels", "pixels"],
        POSTER,
    ),
    "image as text": BadInput(
        items(poster=pa.array(["poster.jpg"])),
        ["'poster'", "string", "binary"],
        POSTER,
    ),
    "feature of another width": BadInput(
        clips([1.0] * 5), [CLIP_3, "5 values", f" {FEATURE_WIDTH};"], CLIP
    ),
    "NaN in a feature": BadInput(
        clips([float("nan")] * FEATURE_WIDTH),
        [CLIP_3, "not finite"],
        CLIP,
    ),
}
