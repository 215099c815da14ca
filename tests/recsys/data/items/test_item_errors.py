"""Items that cannot be used are named by file, column and row."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys.config import ModalitySettings
from recsys.data.items.content_store import ContentStore
from recsys.diagnostics.dataset.command import explain_data
from tests.datasets import png, write_dataset
from tests.recsys.data.items.item_content import (
    MODALITIES,
    rewrite,
    store_of,
    table_of,
    write_items,
)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", {}, num_items=8)


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
    message = f"{file}: column 'poster', row 3: .*JPEG or PNG"
    with pytest.raises(ValueError, match=message):
        store_of(dataset, "poster")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1.0] * 5, "row 3: .*5 values.* 6"),
        ([1.0] * 5 + [None], "row 3: .*not finite"),
        ([1.0] * 5 + [float("nan")], "row 3: .*not finite"),
        ([float("inf")] * 6, "row 3: .*not finite"),
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
    with pytest.raises(ValueError, match=r"column 'clip', row 2: .*0 values"):
        store_of(dataset, "clip")


def test_features_that_all_lack_are_named(dataset: Path) -> None:
    nulls = pa.nulls(8, pa.list_(pa.float32()))
    rewrite(dataset, lambda table: table.set_column(3, "clip", nulls))
    with pytest.raises(ValueError, match=f"{dataset}/items: column 'clip' .*every row"):
        store_of(dataset, "clip")


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        ("text", pa.array([3]), "string"),
        ("text", pa.array([b"a"]), "string"),
        ("poster", pa.array(["a"]), "binary"),
        ("clip", pa.array(["a"]), "list<float>"),
        ("clip", pa.array([[1]]), "list<float>"),
        ("clip", pa.array([{"a": 1.0}]), "list<float>"),
        ("clip", pa.array([[[[1.0]]]]), "list<float>"),
    ],
)
def test_a_column_of_another_type_is_named_with_its_file(
    dataset: Path, name: str, array: pa.Array, expected: str
) -> None:
    file = write_items(dataset, **{name: array})
    message = f"{file}: column '{name}' .*, expected .*{expected}"
    with pytest.raises(ValueError, match=message):
        store_of(dataset, name)


@pytest.mark.parametrize("name", ["text", "poster", "clip"])
def test_a_missing_column_is_named_with_its_file(dataset: Path, name: str) -> None:
    rewrite(dataset, lambda table: table.drop_columns([name]))
    file = dataset / "items" / "part-0.parquet"
    with pytest.raises(ValueError, match=f"{file}: column '{name}' is missing"):
        store_of(dataset, name)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pa.array([8, 9, 10, 9]), "row 3: item 9 "),
        (pa.array([8, 9, 10, 3]), "row 3: item 3 "),
        (pa.array([8, 9, 10, 20]), r"row 3: id 20 is outside \[0, 20\).*num_embeddings"),
        (pa.array([8, 9, 10, -1]), r"row 3: id -1 is outside \[0, 20\).*num_embeddings"),
        (pa.array([8, 9, 10, 2**63], pa.uint64()), rf"row 3: id {2**63} is outside \[0, 20\)"),
        (pa.array([8, 9, 10, None]), "row 3: null"),
        (pa.array(list("abcd")), ".*string.*integer"),
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
    with pytest.raises(ValueError, match=f"{file}: .*Parquet"):
        table_of(dataset)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{dataset}/items: no \*.parquet"):
        table_of(dataset)


def test_items_without_rows_are_named(dataset: Path) -> None:
    rewrite(dataset, lambda table: table.slice(0, 0))
    with pytest.raises(ValueError, match=f"{dataset}/items: .*no rows"):
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
    message = f"content.modalities.x: .* column '{modality.column}' of kind {modality.kind}"
    with pytest.raises(ValueError, match=message):
        ContentStore(table_of(dataset), {"x": modality}, dataset.parent / "cache")


@pytest.mark.parametrize("content", [["posters/1.jpg"] * 8, [b"posters/1.jpg"] * 8])
def test_paths_in_place_of_images_are_refused_before_any_content_is_prepared(
    tmp_path: Path, content: list[Any]
) -> None:
    data = write_dataset(tmp_path / "data", num_items=8)
    rewrite(
        data,
        lambda table: table.set_column(
            table.column_names.index("poster"), "poster", pa.array(content)
        ),
    )
    with pytest.raises(ValueError, match=r"column 'poster'.*(string|posters/1\.jpg)"):
        ContentStore(table_of(data), MODALITIES, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=r"column 'poster'.*(string|posters/1\.jpg)"):
        explain_data(str(data))
