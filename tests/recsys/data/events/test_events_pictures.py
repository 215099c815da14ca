"""Content of items: files that the item table names become bytes, lists of texts one text."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.data.events import snapshots
from recsys.data.events.prepare import prepare_events
from recsys.data.schema import load_schema
from recsys.storage.location import Location
from tests.datasets import png

PICTURES = [png(np.random.default_rng(seed)) for seed in range(5)]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Five items, of which the third has no picture, in `shop/`, pictures in `shop/pictures/`."""
    folder = tmp_path / "shop"
    (folder / "pictures" / "small").mkdir(parents=True)
    paths: list[str | None] = [f"small/{item}.png" for item in range(5)]
    for path, picture in zip(paths, PICTURES, strict=True):
        (folder / "pictures" / str(path)).write_bytes(picture)
    paths[2] = None
    pq.write_table(pa.table({"id": range(5), "file": paths}), folder / "items.parquet")
    log = {
        "user": [f"u{row % 3}" for row in range(30)],
        "item": [row % 5 for row in range(30)],
        "time": [1_790_000_000 + row for row in range(30)],
    }
    pq.write_table(pa.table(log), folder / "log.parquet")
    content = {"kind": "image", "path_column": "file", "folder": "pictures"}
    return {
        "events": {"view": {"path": "log.parquet"}},
        "labels": {"viewed": {"action": "view"}},
        "items": {"path": "items.parquet", "content": {"photo": content}},
    }


def prepare(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "shop" / "events.yaml").write_text(yaml.safe_dump(config))
    prepare_events(folder / "shop" / "events.yaml", folder / "data")
    return folder / "data"


def test_files_become_bytes_in_the_order_of_items(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "PICTURES_PER_GROUP", 2)
    data = prepare(tmp_path, config)
    items = pq.read_table(data / "items").to_pydict()
    assert items == {"item": list(range(5)), "photo": [*PICTURES[:2], None, *PICTURES[3:]]}
    schema = load_schema(Location.of(data))
    assert schema.items is not None
    assert schema.items.columns["photo"].kind == "image"


@pytest.mark.parametrize(
    ("spoil", "texts"),
    [
        (lambda file: file.unlink(), ["0.png", "item 0", "'file'"]),
        (lambda file: file.write_text("no"), ["0.png", "item 0"]),
    ],
)
def test_a_missing_file_and_other_content_are_refused(
    config: dict[str, Any], tmp_path: Path, spoil: Any, texts: list[str]
) -> None:
    spoil(tmp_path / "shop/pictures/small/0.png")
    with pytest.raises(ValueError) as caught:
        prepare(tmp_path, config)
    for text in texts:
        assert text in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["shop"]


def test_a_list_of_texts_is_one_text(config: dict[str, Any], tmp_path: Path) -> None:
    tags: list[list[str | None] | None] = [["red", "new"], None, [], ["blue", None, "old"], ["a"]]
    items = pa.table({"id": range(5), "tags": pa.array(tags, pa.list_(pa.string()))})
    pq.write_table(items, tmp_path / "shop" / "items.parquet")
    config["items"]["content"] = {"tags": "text"}
    data = prepare(tmp_path, config)
    texts = pq.read_table(data / "items")["tags"].to_pylist()
    assert texts == ["red, new", None, "", "blue, old", "a"]
