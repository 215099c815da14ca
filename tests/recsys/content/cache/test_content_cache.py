"""Content is made once, made again when anything it is made from changes, and never half."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys.config import ModalitySettings
from recsys.data.items.content_store import ContentStore
from tests.datasets import png, write_dataset
from tests.recsys.data.items.item_content import (
    MODALITIES,
    POSTER,
    TEXT,
    rewrite,
    store_of,
    table_of,
    write_items,
)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", {}, num_items=8)


def fail(*_: Any) -> None:
    raise AssertionError("written again")


def test_a_second_store_uses_what_the_first_has_made(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store_of(dataset, *MODALITIES)
    for kind in first.kinds.values():
        monkeypatch.setattr(type(kind), "write", fail)
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
    old_folders = store_of(dataset, *MODALITIES).folders

    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[5] = value
        return table.set_column(index, name, pa.array(values, table[name].type))

    rewrite(dataset, change)
    new_folders = store_of(dataset, *MODALITIES).folders
    assert {other for other in MODALITIES if old_folders[other] != new_folders[other]} == {name}


def test_the_same_content_under_other_ids_is_made_again(dataset: Path) -> None:
    old_folders = store_of(dataset, "clip").folders["clip"]
    swapped = [1, 0, *range(2, 8)]
    rewrite(
        dataset,
        lambda table: table.set_column(0, "item", table["item"].take(pa.array(swapped))),
    )
    store = store_of(dataset, "clip")
    assert store.folders["clip"] != old_folders


def test_settings_that_change_the_arrays_are_part_of_their_name(dataset: Path) -> None:
    def folder(modality: ModalitySettings) -> Path:
        store = ContentStore(table_of(dataset), {"x": modality}, dataset.parent / "cache")
        store.build("x")
        return store.folders["x"]

    longer = ModalitySettings(kind="text", column="text", encoder="random:bert", max_length=9)
    larger = ModalitySettings(kind="image", column="poster", encoder="random:vit", image_size=9)
    assert folder(TEXT) != folder(longer)
    assert folder(POSTER) != folder(larger)


def test_what_fails_while_being_written_leaves_nothing(dataset: Path) -> None:
    write_items(dataset, poster=pa.array([png(np.random.default_rng(0)), b"no image"]))
    with pytest.raises(ValueError, match="readable image"):
        store_of(dataset, "poster")
    assert list((dataset.parent / "cache").iterdir()) == []
