"""What a batch gets of each item's content, against the rows of the items' files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.content.encoders.pretrained import tiny_tokenizer
from recsys.data.items.content_store import ContentStore
from recsys.data.items.images import decode_image
from recsys.data.items.item_values import digests_of, feature_tokens, usable_features
from recsys.data.items.kind import ContentInput
from recsys.diagnostics.dataset.findings import explain_data
from tests.datasets import write_dataset
from tests.recsys.data.items.item_content import (
    CLIP,
    MODALITIES,
    items_of,
    rewrite,
    store_of,
    table_of,
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


def test_two_features_that_added_items_lack_have_their_own_widths(dataset: Path) -> None:
    nulls = pa.nulls(8, pa.list_(pa.float32()))
    rewrite(dataset, lambda table: table.set_column(3, "clip", nulls))
    modalities = {"narrow": CLIP, "wide": CLIP}
    store = ContentStore(table_of(dataset), modalities, dataset.parent / "cache", may_be_empty=True)
    for name, width in (("narrow", 2), ("wide", 3)):
        store.kinds[name].entry_shape = (width,)
        store.build(name)
        assert store.arrays[name].values.shape[1:] == (width,)


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
    for name, content in store_of(dataset, *MODALITIES).gather(np.array([19, 3])).items():
        assert not content.mask[0].any(), name
        assert not content.values[0].any(), name
        assert content.mask[1].any(), name


def test_items_that_are_replaced_while_a_job_reads_them_are_refused(dataset: Path) -> None:
    store = ContentStore(table_of(dataset), MODALITIES, dataset.parent / "cache")
    rewrite(dataset, lambda table: table.take(pa.array(range(8)[::-1])))
    with pytest.raises(ValueError, match=r"part-0\.parquet: was replaced after the job had opened"):
        store.build("text")


def test_a_schema_without_items_is_told_how_to_go_without_content(dataset: Path) -> None:
    schema = dataset / "schema.yaml"
    schema.write_text(schema.read_text().split("items:")[0])
    with pytest.raises(ValueError, match=f"{schema}: .* needs `items`.*`content: none`"):
        table_of(dataset)


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


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16(), pa.int64(), pa.uint8()])
def test_a_number_is_a_token_of_width_one_and_null_has_none(kind: pa.DataType) -> None:
    column = pa.array([3, None, 7], kind)
    assert feature_tokens(column.slice(1), "items")[0].tolist() == [0, 1]
    lengths, values = usable_features(*feature_tokens(column, "items"), 1, lambda *_: None)
    assert lengths.tolist() == [1, 0, 1]
    assert values.tolist() == [[3], [7]]
    assert values.dtype == np.float32


def test_items_of_equal_pixels_have_one_hash_and_an_item_without_an_image_has_none() -> None:
    pixels = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2).repeat(4, 1, 1, 1)
    pixels[1] += 1
    content = ContentInput(pixels, torch.tensor([[True], [True], [True], [False]]))
    first, second, third = digests_of(content)
    assert first == third != second
