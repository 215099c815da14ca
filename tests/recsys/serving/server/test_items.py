"""A server with encoders takes new items: they are served when it answers."""

import base64
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.data.items.images import num_images
from recsys.data.items.item_values import feature_tokens
from recsys.data.schema import load_schema
from recsys.serving import Scorer
from recsys.serving.new_items import send
from recsys.serving.new_items.add import add_items, item_rows
from recsys.serving.new_items.send import send_items
from recsys.storage.location import Location
from tests.recsys.serving.server.served_package import TOKEN, ServedPackage
from tests.recsys.serving.serving_runs import requests
from tests.recsys.serving.test_add_items import NEW, new_items, run_with_new_items

ADDITIONS = 50


@pytest.fixture(scope="module")
def run(session_folder: Path) -> Path:
    """Data with raw ids of items, run and package."""
    return run_with_new_items(session_folder)


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPackage]:
    folder = tmp_path_factory.mktemp("posted")
    shutil.copytree(run / "package", folder / "served")
    options = ("--encoders", "true", "--max_items", "60")
    server = ServedPackage(folder / "served", folder / "log", *options)
    yield server
    assert server.end() == 0


def posted(table: pa.Table) -> dict[str, Any]:
    """Rows of a file as a request has them."""
    rows = table.to_pylist()
    for row in rows:
        row["poster"] = row["poster"] and base64.b64encode(row["poster"]).decode()
    return {"items": rows}


def test_posted_items_score_as_those_that_the_command_adds(
    run: Path, server: ServedPackage, tmp_path: Path
) -> None:
    items = new_items(run / "data", NEW)
    pq.write_table(items, tmp_path / "new.parquet")
    package = Path(shutil.copytree(run / "package", tmp_path / "by_command"))
    add_items(package, str(tmp_path / "new.parquet"))
    old_versions = server.call("/v2/models/shop").content["versions"]
    response = server.call("/v1/items", posted(items))
    assert response.status == 200, response.body
    assert {name: response.content[name] for name in ("new", "changed", "unchanged")} == {
        "new": 3,
        "changed": 0,
        "unchanged": 0,
    }
    assert [response.content["model_version"]] == server.call("/v2/models/shop").content["versions"]
    assert [response.content["model_version"]] != old_versions
    request = next(r for r in requests(run / "data") if r["history"]["history"])
    request["candidates"] = NEW
    expected = Scorer.load(package).score(**request)[:, 0]
    content = server.call("/v1/rank", request).content
    by_item = dict(zip(content["items"], content["scores"]["liked"], strict=True))
    np.testing.assert_allclose([by_item[item] for item in NEW], expected, atol=1e-6)
    assert send_items(f"http://127.0.0.1:{server.port}", str(tmp_path / "new.parquet"), TOKEN) == (
        "0 new, 0 changed, 3 unchanged, 0 features"
    )


def test_an_item_answers_within_a_second_also_when_several_come_at_once(
    run: Path, server: ServedPackage
) -> None:
    table = new_items(run / "data", list(range(1000, 1000 + ADDITIONS + 8)))
    seconds = []
    for row in range(ADDITIONS):
        started = time.perf_counter()
        assert server.call("/v1/items", posted(table.slice(row, 1))).status == 200
        seconds.append(time.perf_counter() - started)
    assert np.quantile(seconds, 0.95) < 1, np.quantile(seconds, [0.5, 0.95, 1])
    with ThreadPoolExecutor(8) as threads:
        bodies = [posted(table.slice(ADDITIONS + row, 1)) for row in range(8)]
        responses = list(threads.map(lambda body: server.call("/v1/items", body), bodies))
    assert [response.content["new"] for response in responses] == [1] * 8


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"items": []}, "items: are 0; give 1 to 60"),
        ({"items": [{"item": 7}] * 61}, "items: are 61; give 1 to 60"),
        ({"items": [{"item": 7, "colour": "red"}]}, "['colour'] are none of the columns"),
        ({"items": [{"item": 7, "poster": "?"}]}, "items: column 'poster'"),
        ({"items": [{"item": 7, "text": "a"}, {"item": 8}]}, "some have content and others none"),
        ({"items": [{"item": None, "text": "a"}]}, "items: column 'item': ids of type null"),
    ],
)
def test_items_that_cannot_be_used_are_refused(
    server: ServedPackage, body: dict[str, Any], problem: str
) -> None:
    response = server.call("/v1/items", body)
    assert response.status == 400 and problem in response.content["error"]
    assert server.call("/v1/items", body, authorization="Bearer other").status == 401


SCHEMA = """
target_item: item
group: item
columns:
  item: {kind: id, num_embeddings: 9}
  price: {kind: dense}
  brand: {kind: id, num_embeddings: 9}
  liked: {kind: label}
items:
  id: item
  columns: {title: {kind: text}, brand: {kind: category}, shape: {kind: feature}}
features: [{by: [item], columns: [price, brand]}]
"""


def test_what_posted_items_leave_out_does_not_change(tmp_path: Path) -> None:
    """A feature that is a category, too, is no content: a null title would replace the item's."""
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    schema = load_schema(Location.of(tmp_path))
    assert item_rows(schema, [{"item": 1, "brand": 3}]).to_pylist() == [{"item": 1, "brand": 3}]
    titled = {"item": 1, "title": "shoe", "shape": None}
    assert item_rows(schema, [titled]).to_pylist() == [titled]
    with pytest.raises(ValueError, match="some have 'price' and others none"):
        item_rows(schema, [{"item": 1, "price": 2.5}, {"item": 2, "brand": 3}])


def test_decimal_numbers_of_a_file_are_sent_as_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = []
    monkeypatch.setattr(send, "_send", lambda _, body, *__: bodies.append(body) or {})
    pq.write_table(pa.table({"item": [1], "price": [Decimal("9.25")]}), tmp_path / "new.parquet")
    send_items("http://shop", str(tmp_path / "new.parquet"), None)
    assert json.loads(bodies[0]) == {"items": [{"item": 1, "price": 9.25}]}


@pytest.mark.parametrize("shape", [1, [], [1, 0], [[1, 0], [2, 3]]])
def test_whole_numbers_of_a_posted_feature_are_floats(tmp_path: Path, shape: Any) -> None:
    """JavaScript writes 1.0 as 1."""
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    rows = item_rows(load_schema(Location.of(tmp_path)), [{"item": 1, "shape": shape}])
    lengths, tokens = feature_tokens(rows["shape"].combine_chunks(), "items")
    assert lengths.tolist() == [len(np.atleast_2d(shape)) if np.size(shape) else 0]
    assert np.ravel(tokens.to_pylist()).tolist() == np.ravel(shape).tolist()


@pytest.mark.parametrize("image", ["no base64", 3, ["aGk=", "*"]])
def test_a_posted_image_that_cannot_be_read_is_named_by_its_item(
    tmp_path: Path, image: Any
) -> None:
    (tmp_path / "schema.yaml").write_text(SCHEMA.replace("{kind: text}", "{kind: image}"))
    posted = [{"item": 1, "title": "aGk="}, {"item": 7, "title": image}]
    with pytest.raises(ValueError, match=r"column 'title': item '7': .*give .* base64"):
        item_rows(load_schema(Location.of(tmp_path)), posted)


@pytest.mark.parametrize("images", [[], [None, None]])
def test_posted_lists_without_an_image_are_lists_of_images(tmp_path: Path, images: Any) -> None:
    (tmp_path / "schema.yaml").write_text(SCHEMA.replace("{kind: text}", "{kind: image}"))
    rows = item_rows(load_schema(Location.of(tmp_path)), [{"item": 1, "title": images}])
    assert num_images(rows["title"].combine_chunks(), "items").tolist() == [len(images)]
