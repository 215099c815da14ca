"""What a batch gets of each item's content, against the rows of the items' files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.content.encoders.tiny_encoders import tiny_tokenizer
from recsys.data.items.images import decode_image
from tests.datasets import write_dataset
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


def test_images_are_decoded_and_null_images_are_masked(dataset: Path) -> None:
    poster = store_of(dataset, "poster").gather(np.arange(8))["poster"]
    assert (poster.values.dtype, poster.values.shape) == (torch.uint8, (8, 3, 8, 8))
    assert poster.mask.tolist() == [[item != 1] for item in range(8)]
    assert not poster.values[1].any()
    for item, row in items_of(dataset).items():
        if row["poster"] is not None:
            expected = decode_image(row["poster"], 8, "")
            assert np.array_equal(poster.values[item], expected)


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
