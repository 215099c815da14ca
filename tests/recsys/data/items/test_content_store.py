"""What a batch gets of each item's content, against the rows of the items' files."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.content.encoders.tiny_encoders import tiny_tokenizer
from recsys.data.filesystem import Location
from recsys.data.items.content_store import ContentStore
from recsys.data.items.images import decode_image
from recsys.data.items.item_table import ItemTable
from recsys.data.schema import load_schema
from tests.datasets import FEATURE_WIDTH, write_dataset
from tests.recsys.data.items.item_content import (
    MODALITIES,
    items_of,
    rewrite,
    store_of,
    write_items,
)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", {}, num_items=8)


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
    column = pa.array([[[1, 2], [3, 4]], None, [[5, 6]], []], pa.list_(pa.list_(pa.float32())))
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
        store.build(name)
        assert torch.equal(store.gather(np.arange(8))[name].values, local[name].values)
    root.filesystem.rm(root.path, recursive=True)


def test_a_store_travels_to_another_process_without_tokenizers(dataset: Path) -> None:
    store = store_of(dataset, *MODALITIES)
    pickled = pickle.dumps(store.kinds)
    assert len(pickled) < 3000
    again = pickle.loads(pickled)
    assert {name: type(kind) for name, kind in again.items()} == {
        name: type(kind) for name, kind in store.kinds.items()
    }
