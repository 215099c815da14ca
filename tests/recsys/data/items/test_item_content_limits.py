"""Limits of the content of items, and pictures that are decoded."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import ExifTags, Image

from recsys.content.encoders.pretrained import tiny_tokenizer
from recsys.data.items import item_table
from recsys.data.items.content_store import ContentStore
from recsys.data.items.images import decode_image
from recsys.data.items.item_table import ItemTable
from recsys.data.items.item_values import tokenize
from recsys.data.schema import load_schema
from recsys.distributed.ranks import joined_ranks
from recsys.storage.location import Location
from tests.datasets import FEATURE_WIDTH, png, write_dataset
from tests.recsys.data.items.bad_items import not_utf8
from tests.recsys.data.items.item_content import MODALITIES, store_of, write_items


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", {}, num_items=8)


def has_content(store: ContentStore, name: str, *items: int) -> list[bool]:
    """Which items have this content."""
    return store.gather(np.array(items))[name].mask.any(dim=1).tolist()


@pytest.mark.parametrize(
    "text",
    [
        "a book of many words " * 5_000,
        " " * 100_000 + "at last a word",
        "x" * 100_000 + " and a word",
    ],
)
def test_a_long_text_cut_before_its_tokens_has_those_of_the_whole(text: str) -> None:
    tokenizer, short = tiny_tokenizer(), "short"
    expected = tokenizer([text, short], truncation=True, max_length=16)["input_ids"]
    assert tokenize([text, None, short, ""], 16, tokenizer) == [expected[0], [], expected[1], []]


def test_columns_are_read_a_few_rows_at_a_time(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = store_of(dataset, "text", "poster", "clip").gather(np.arange(8))
    monkeypatch.setattr(item_table, "ROWS_PER_CHUNK", 3)
    root = Location.of(dataset)
    items = ItemTable(root, load_schema(root))
    assert max(len(chunk) for _, _, chunk in items.chunks("poster")) == 3
    store = ContentStore(items, MODALITIES, dataset.parent / "other")
    for name in MODALITIES:
        store.build(name)
        tokens = store.gather(np.arange(8))[name]
        assert tokens.values.equal(full[name].values)
        assert tokens.mask.equal(full[name].mask)


def test_an_image_of_16_bits_keeps_its_shades() -> None:
    shades = np.repeat(np.arange(4, dtype=np.uint16)[None] * 0x4000 + 0x55, 4, axis=0)
    buffer = BytesIO()
    Image.fromarray(shades).save(buffer, format="PNG")
    assert decode_image(buffer.getvalue(), 4)[0, 0].tolist() == [0, 64, 128, 192]


def test_an_image_is_turned_as_its_camera_was_held() -> None:
    shades = np.repeat(np.array([0, 80, 160, 240], np.uint8)[None], 4, axis=0)  # darkest left
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    for header in (exif.tobytes(), b"Exif\0\0 damaged"):
        buffer = BytesIO()
        Image.fromarray(shades).convert("RGB").save(buffer, format="PNG", exif=header)
        pixels = decode_image(buffer.getvalue(), 4)[0]
        is_turned = header == exif.tobytes()
        assert (pixels[:, 0] if is_turned else pixels[0]).tolist() == [0, 80, 160, 240]


def test_a_damaged_cache_is_named(dataset: Path) -> None:
    folder = store_of(dataset, "text").folders["text"]
    for name in ("values.npy", "offsets.npy"):
        good = (folder / name).read_bytes()
        for bad in (b"", good[:-8], good[:20]):
            (folder / name).write_bytes(bad)
            with pytest.raises(ValueError, match=f"{folder}: damaged"):
                store_of(dataset, "text")
        (folder / name).write_bytes(good)
    np.save(folder / "values.npy", np.load(folder / "values.npy")[:1])
    with pytest.raises(ValueError, match=rf"{folder}: damaged"):
        store_of(dataset, "text")


def test_bad_content_is_skipped_as_missing_and_counted(dataset: Path) -> None:
    """Also by a second store, which finds what was made in the cache."""
    good, nan = [1.0] * FEATURE_WIDTH, float("nan")
    image = png(np.random.default_rng(0))
    file = write_items(
        dataset,
        text=pa.concat_arrays([not_utf8(b"\xff"), pa.array(["good"])]),
        poster=pa.array([b"no image", image, b"", None]),
        clip=pa.array([[1.0] * 5, good, [nan] * FEATURE_WIDTH, good], pa.list_(pa.float32())),
    )
    for _ in range(2):
        store = store_of(dataset, "text", "poster", "clip", on_bad_row="skip")
        assert has_content(store, "text", 8, 9, 10, 11) == [True, False, False, True]
        assert has_content(store, "poster", 8, 9, 10, 11) == [False, True, False, False]
        assert has_content(store, "clip", 8, 9, 10, 11) == [False, True, False, True]
        with joined_ranks("cpu") as ranks:
            summary = store.items.bad_rows.summary(ranks, "items")
        entries = {
            (entry["column"], entry["reason"]): (entry["rows"], entry["first_row"])
            for entry in summary["found"]
        }
        assert entries == {
            ("text", "text that is not UTF-8"): (1, 2),
            ("poster", "unreadable image"): (2, 0),
            ("clip", f"a feature of other than {FEATURE_WIDTH} values"): (1, 0),
            ("clip", "a feature with a value that is null or not finite"): (1, 2),
        }
        assert {entry["file"] for entry in summary["found"]} == {str(file)}
        json.dumps(summary)


def test_rows_of_unusable_items_are_skipped_and_the_others_keep_their_content(
    dataset: Path,
) -> None:
    ids = pa.array([19, None, 20, 3, 19, 12])
    clips = pa.array([[float(index)] * FEATURE_WIDTH for index in range(6)], pa.list_(pa.float32()))
    file = write_items(dataset, item=ids, clip=clips)
    store = store_of(dataset, "clip", on_bad_row="skip")
    assert store.items.ids[-2:].tolist() == [19, 12]
    assert store.gather(np.array([19, 12]))["clip"].values[:, 0, 0].tolist() == [0.0, 5.0]
    assert store.items.bad_rows.counts == {
        (str(file), "item", 0, "null"): (1, 1),
        (str(file), "item", 0, "id outside [0, 20)"): (1, 2),
        (str(file), "item", 0, "a second row of an item"): (2, 3),
    }


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def test_an_image_keeps_its_centre_square() -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :2], pixels[:, 6:] = 255, 255  # outside of the centre
    pixels[:, 2:6] = np.arange(4 * 4 * 3).reshape(4, 4, 3)
    decoded = decode_image(encoded(Image.fromarray(pixels)), 4, "")
    assert np.array_equal(decoded, pixels[:, 2:6].transpose(2, 0, 1))
    upright = decode_image(encoded(Image.fromarray(pixels.transpose(1, 0, 2))), 4, "")
    assert np.array_equal(upright, pixels[:, 2:6].transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("1", "PNG")]
)
def test_images_of_every_mode_become_rgb(mode: str, kind: str) -> None:
    image = Image.new("RGB", (20, 30), (255, 255, 255)).convert(mode)
    decoded = decode_image(encoded(image, kind), 6, "")
    assert (decoded.shape, decoded.dtype) == ((3, 6, 6), np.uint8)
    assert (decoded >= 254).all()


def test_a_very_long_image_is_not_blown_up() -> None:
    image = Image.new("RGB", (60_000, 1), (9, 9, 9))
    assert (decode_image(encoded(image), 64, "") == 9).all()
