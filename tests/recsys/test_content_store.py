"""The content of items: what a batch gets of each, when the cache is used, and what is refused."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from recsys.config import ModalitySettings
from recsys.content.tiny_encoders import tiny_tokenizer
from recsys.data.content_store import ContentStore, decode_image, default_cache, publish
from recsys.data.filesystem import Location
from recsys.data.item_table import ItemTable
from recsys.data.schema import load_schema
from tests.datasets import FEATURE_WIDTH, png, write_dataset, write_parquet

TEXT = ModalitySettings(kind="text", column="text", encoder="random:bert", max_length=8)
POSTER = ModalitySettings(kind="image", column="poster", encoder="random:vit", image_size=8)
CLIP = ModalitySettings(kind="feature", column="clip")
MODALITIES = {"text": TEXT, "poster": POSTER, "clip": CLIP}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", {}, num_items=8)


def table_of(dataset: Path) -> ItemTable:
    root = Location.of(dataset)
    return ItemTable(root, load_schema(root))


def store_of(dataset: Path, *names: str) -> ContentStore:
    modalities = {name: MODALITIES[name] for name in names}
    store = ContentStore(table_of(dataset), modalities, dataset.parent / "cache")
    for name in names:
        store.build(name, tiny_tokenizer() if name == "text" else None)
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


def test_text_is_tokenised_and_null_or_empty_text_is_masked(dataset: Path) -> None:
    text = store_of(dataset, "text").gather(np.arange(8))["text"]
    assert (text.values.dtype, text.mask.dtype) == (torch.int64, torch.bool)
    assert text.values.shape == text.mask.shape == (8, 8)
    for item, row in items_of(dataset).items():
        expected = (
            tiny_tokenizer()(row["text"], truncation=True, max_length=8)["input_ids"]
            if row["text"]
            else []
        )
        assert text.values[item][text.mask[item]].tolist() == expected
        assert not text.values[item][~text.mask[item]].any()
    assert not text.mask[:2].any()
    assert text.mask[2:].any(dim=1).all()


def test_tokens_are_padded_to_the_longest_text_of_the_batch(dataset: Path) -> None:
    write_items(dataset, text=pa.array(["a", "ab"]))
    text = store_of(dataset, "text").gather(np.array([8, 9]))["text"]
    assert text.mask.tolist() == [[True, True, True, False], [True, True, True, True]]


def test_images_are_decoded_and_null_images_are_masked(dataset: Path) -> None:
    poster = store_of(dataset, "poster").gather(np.arange(8))["poster"]
    assert (poster.values.dtype, poster.values.shape) == (torch.uint8, (8, 3, 8, 8))
    assert poster.mask.tolist() == [[item != 1] for item in range(8)]
    assert not poster.values[1].any()
    for item, row in items_of(dataset).items():
        if row["poster"] is not None:
            expected = decode_image(row["poster"], 8, "")
            assert np.array_equal(poster.values[item], expected)


def test_features_are_copied_and_null_features_are_masked(dataset: Path) -> None:
    clip = store_of(dataset, "clip").gather(np.arange(8))["clip"]
    assert (clip.values.dtype, clip.values.shape) == (torch.float32, (8, 1, FEATURE_WIDTH))
    assert clip.mask.tolist() == [[item != 2] for item in range(8)]
    for item, row in items_of(dataset).items():
        expected = row["clip"] or [0.0] * FEATURE_WIDTH
        assert clip.values[item, 0].tolist() == expected


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float64(), 2),
        pa.list_(pa.float16()),
        pa.large_list(pa.float32()),
    ],
    ids=str,
)
def test_features_of_every_list_type_are_read(dataset: Path, kind: pa.DataType) -> None:
    values = [None, [1, 2], [0.5, 0], None]
    numbers = [value and [np.float16(x) for x in value] for value in values]
    column = pa.array(numbers, kind)
    rewrite(dataset, lambda table: table.slice(0, 4).set_column(3, "clip", column))
    ids = pq.read_table(dataset / "items")["item"].to_numpy()
    clip = store_of(dataset, "clip").gather(ids)["clip"]
    assert clip.values[:, 0].tolist() == [[0, 0], [1, 2], [0.5, 0], [0, 0]]
    assert clip.mask[:, 0].tolist() == [False, True, True, False]


def test_a_feature_may_have_several_tokens(dataset: Path) -> None:
    column = pa.array(
        [[[1, 2], [3, 4]], None, [[5, 6]], []], pa.list_(pa.list_(pa.float32()))
    )
    rewrite(dataset, lambda table: table.slice(0, 4).set_column(3, "clip", column))
    ids = pq.read_table(dataset / "items")["item"].to_numpy()
    clip = store_of(dataset, "clip").gather(ids)["clip"]
    empty = [0, 0]
    assert clip.values.tolist() == [
        [[1, 2], [3, 4]],
        [empty, empty],
        [[5, 6], empty],
        [empty, empty],
    ]
    assert clip.mask.tolist() == [[True, True], [False, False], [True, False], [False, False]]


def test_an_item_without_a_row_has_no_content(dataset: Path) -> None:
    write_items(dataset, text=pa.array(["a"]))
    for name, part in store_of(dataset, *MODALITIES).gather(np.array([19, 3])).items():
        assert not part.mask[0].any(), name
        assert not part.values[0].any(), name
        assert part.mask[1].any(), name


def test_content_of_no_items_is_empty(dataset: Path) -> None:
    for part in store_of(dataset, *MODALITIES).gather(np.zeros(0, np.int64)).values():
        assert part.values.shape[0] == part.mask.shape[0] == 0


def test_items_may_lie_in_several_files(dataset: Path) -> None:
    write_items(dataset, clip=pa.array([None, [1.0] * 6, [2.0] * 6], pa.list_(pa.float32())))
    clip = store_of(dataset, "clip").gather(np.array([10, 9, 8]))["clip"]
    assert clip.values[:, 0, 0].tolist() == [2, 1, 0]
    assert clip.mask[:, 0].tolist() == [True, True, False]


def test_a_url_gives_the_same_content_as_a_local_folder(dataset: Path) -> None:
    url = f"memory://items-{id(dataset)}"
    root = Location.of(url)
    root.filesystem.put(f"{dataset}/", root.path, recursive=True)
    store = ContentStore(ItemTable(root, load_schema(root)), MODALITIES, dataset.parent / "other")
    local = store_of(dataset, *MODALITIES).gather(np.arange(8))
    for name in MODALITIES:
        store.build(name, tiny_tokenizer())
        assert torch.equal(store.gather(np.arange(8))[name].values, local[name].values)
    root.filesystem.rm(root.path, recursive=True)


def fail(*_: Any) -> None:
    raise AssertionError("written again")


def test_a_second_store_uses_what_the_first_has_made(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store_of(dataset, *MODALITIES)
    for method in ("_write_text", "_write_images", "_write_features"):
        monkeypatch.setattr(ContentStore, method, fail)
    second = store_of(dataset, *MODALITIES)
    assert second.folders == first.folders
    assert len(set(first.folders.values())) == 3


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [("text", 1, "other"), ("poster", 2, png(np.random.default_rng(9))), ("clip", 3, [0.5] * 6)],
)
def test_changing_one_item_makes_the_content_again(
    dataset: Path, name: str, index: int, value: Any
) -> None:
    before = store_of(dataset, *MODALITIES).folders

    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[5] = value
        return table.set_column(index, name, pa.array(values, table[name].type))

    rewrite(dataset, change)
    after = store_of(dataset, *MODALITIES).folders
    assert {other for other in MODALITIES if before[other] != after[other]} == {name}


def test_the_same_content_under_other_ids_is_made_again(dataset: Path) -> None:
    before = store_of(dataset, "clip").folders["clip"]
    swapped = [1, 0, *range(2, 8)]
    rewrite(
        dataset,
        lambda table: table.set_column(0, "item", table["item"].take(pa.array(swapped))),
    )
    store = store_of(dataset, "clip")
    assert store.folders["clip"] != before


def test_settings_that_change_the_arrays_are_part_of_their_name(dataset: Path) -> None:
    def folder(modality: ModalitySettings) -> Path:
        store = ContentStore(table_of(dataset), {"x": modality}, dataset.parent / "cache")
        store.build("x", tiny_tokenizer())
        return store.folders["x"]

    longer = ModalitySettings(kind="text", column="text", encoder="random:bert", max_length=9)
    larger = ModalitySettings(kind="image", column="poster", encoder="random:vit", image_size=9)
    assert folder(TEXT) != folder(longer)
    assert folder(POSTER) != folder(larger)


def test_what_fails_while_being_written_leaves_nothing(dataset: Path) -> None:
    write_items(dataset, poster=pa.array([png(np.random.default_rng(0)), b"no image"]))
    with pytest.raises(ValueError, match="not a readable image"):
        store_of(dataset, "poster")
    assert list((dataset.parent / "cache").iterdir()) == []


def test_what_a_killed_process_left_is_not_used(tmp_path: Path) -> None:
    def killed(path: Path) -> None:
        (path / "values.npy").write_text("half")
        raise KeyboardInterrupt

    target = tmp_path / "array"
    with pytest.raises(KeyboardInterrupt):
        publish(target, killed)
    # A killed process does not even clean up: its folder stays, under another name.
    (tmp_path / ".array.left").mkdir()
    (tmp_path / ".array.left" / "values.npy").write_text("half")
    assert not target.exists()
    publish(target, lambda path: (path / "values.npy").write_text("whole") and None)
    assert (target / "values.npy").read_text() == "whole"


def test_of_two_processes_that_write_the_same_the_first_wins(tmp_path: Path) -> None:
    target = tmp_path / "array"

    def slower(path: Path) -> None:
        publish(target, lambda other: (other / "name").write_text("first") and None)
        (path / "name").write_text("second")

    publish(target, slower)
    assert (target / "name").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_the_default_cache_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "recsys"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "recsys"


# Images


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


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encoded(Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    with pytest.raises(ValueError, match="row 3: not a readable image .*decompression bomb"):
        decode_image(bomb, 8, "row 3")


@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "header"])
def test_an_unreadable_image_is_named_with_file_and_row(dataset: Path, damage: str) -> None:
    good = png(np.random.default_rng(0), 50, 50)
    bad = {
        "text": b"not an image",
        "empty": b"",
        "truncated": good[: len(good) // 2],
        "header": good[:20] + b"\xff" * 20 + good[40:],
    }[damage]
    file = write_items(dataset, poster=pa.array([good, None, good, bad]))
    message = f"{file}: column 'poster', row 3: not a readable image .*; write JPEG or PNG bytes"
    with pytest.raises(ValueError, match=message):
        store_of(dataset, "poster")


# What is refused


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1.0] * 5, "row 3: a feature has 5 values, earlier ones have 6"),
        ([1.0] * 5 + [None], "row 3: a feature has a value that is null or not finite"),
        ([1.0] * 5 + [float("nan")], "row 3: a feature has a value that is null or not finite"),
        ([float("inf")] * 6, "row 3: a feature has a value that is null or not finite"),
    ],
)
def test_a_feature_that_does_not_fit_is_named_with_file_and_row(
    dataset: Path, bad: list[Any], message: str
) -> None:
    clip = pa.array([[1.0] * 6, None, [], bad], pa.list_(pa.float32()))
    file = write_items(dataset, clip=clip)
    with pytest.raises(ValueError, match=f"{file}: column 'clip', {message}"):
        store_of(dataset, "clip")


def test_a_token_of_another_width_is_named_with_its_row(dataset: Path) -> None:
    tokens = [[[1.0, 2], [3, 4]], None, [[5, 6], None], [[7, 8]]]
    column = pa.array(tokens, pa.list_(pa.list_(pa.float32())))
    rewrite(dataset, lambda table: table.slice(0, 4).set_column(3, "clip", column))
    with pytest.raises(ValueError, match="column 'clip', row 2: a feature has 0 values, earlier"):
        store_of(dataset, "clip")


def test_features_that_all_lack_are_named(dataset: Path) -> None:
    nulls = pa.nulls(8, pa.list_(pa.float32()))
    rewrite(dataset, lambda table: table.set_column(3, "clip", nulls))
    with pytest.raises(ValueError, match=f"{dataset}/items: column 'clip' is null or empty in ev"):
        store_of(dataset, "clip")


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        ("text", pa.array([3]), "string"),
        ("text", pa.array([b"a"]), "string"),
        ("poster", pa.array(["a"]), "binary"),
        ("clip", pa.array(["a"]), "list<float>"),
        ("clip", pa.array([1.0]), "list<float>"),
        ("clip", pa.array([[1]]), "list<float>"),
        ("clip", pa.array([{"a": 1.0}]), "list<float>"),
        ("clip", pa.array([[[[1.0]]]]), "list<float>"),
    ],
)
def test_a_column_of_another_type_is_named_with_its_file(
    dataset: Path, name: str, array: pa.Array, expected: str
) -> None:
    file = write_items(dataset, **{name: array})
    message = f"{file}: column '{name}' has type .*, expected {expected}"
    with pytest.raises(ValueError, match=message):
        store_of(dataset, name)


@pytest.mark.parametrize("name", ["text", "poster", "clip"])
def test_a_missing_column_is_named_with_its_file(dataset: Path, name: str) -> None:
    rewrite(dataset, lambda table: table.drop_columns([name]))
    file = dataset / "items" / "part-0.parquet"
    with pytest.raises(ValueError, match=f"{file}: column '{name}' is missing; the file has"):
        store_of(dataset, name)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pa.array([8, 9, 10, 9]), "row 3: item 9 has a row already; keep one row per item"),
        (pa.array([8, 9, 10, 3]), "row 3: item 3 has a row already; keep one row per item"),
        (pa.array([8, 9, 10, 20]), r"row 3: id 20 is outside \[0, 20\); raise num_embeddings of"),
        (pa.array([8, 9, 10, -1]), r"row 3: id -1 is outside \[0, 20\); raise num_embeddings of"),
        (pa.array([8, 9, 10, 2**63], pa.uint64()), rf"row 3: id {2**63} is outside \[0, 20\)"),
        (pa.array([8, 9, 10, None]), "row 3: null; every item needs an id"),
        (pa.array(list("abcd")), "has type string, expected integer"),
    ],
)
def test_an_item_id_that_cannot_be_used_is_named_with_file_and_row(
    dataset: Path, ids: pa.Array, message: str
) -> None:
    file = write_items(dataset, item=ids)
    with pytest.raises(ValueError, match=f"{file}: column 'item',? {message}"):
        table_of(dataset)


def test_items_that_lack_are_named(dataset: Path) -> None:
    file = dataset / "items" / "part-0.parquet"
    rewrite(dataset, lambda table: table.drop_columns(["item"]))
    with pytest.raises(ValueError, match=f"{file}: column 'item' is missing"):
        table_of(dataset)
    file.write_bytes(b"not Parquet")
    with pytest.raises(ValueError, match=f"{file}: not a readable Parquet file"):
        table_of(dataset)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{dataset}/items: no \*.parquet files; write one row"):
        table_of(dataset)


def test_items_without_rows_are_named(dataset: Path) -> None:
    rewrite(dataset, lambda table: table.slice(0, 0))
    with pytest.raises(ValueError, match=f"{dataset}/items: its files have no rows"):
        table_of(dataset)


def test_a_schema_without_items_is_told_how_to_go_without_content(dataset: Path) -> None:
    schema = dataset / "schema.yaml"
    schema.write_text(schema.read_text().split("items:")[0])
    with pytest.raises(ValueError, match=f"{schema}: .* needs `items`.*`content: none`"):
        table_of(dataset)


@pytest.mark.parametrize(
    "modality",
    [
        ModalitySettings(kind="text", column="title", encoder="random:bert"),
        ModalitySettings(kind="feature", column="poster"),
    ],
)
def test_a_modality_that_the_schema_does_not_have_is_named(
    dataset: Path, modality: ModalitySettings
) -> None:
    message = f"content.modalities.x: .* no item column '{modality.column}' of kind {modality.kind}"
    with pytest.raises(ValueError, match=message):
        ContentStore(table_of(dataset), {"x": modality}, dataset.parent / "cache")
