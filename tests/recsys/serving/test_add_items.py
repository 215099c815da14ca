"""Items added to a package score as `recsys predict` with them in `items/`, all or none."""

import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from filelock import FileLock

from recsys.checkpoint.run_schema import load_run_schema
from recsys.config import ModalitySettings
from recsys.data.prepare import prepare_vocabularies
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import predict
from recsys.serving import Scorer
from recsys.serving.features.package_features import features_file
from recsys.serving.new_items import added_items
from recsys.serving.new_items.add import AddedCounts, ItemIntake, add_items
from recsys.serving.new_items.added_items import AddedItems
from recsys.serving.new_items.item_encoder import ItemEncoder
from recsys.serving.package import read_manifest, write_manifest
from tests.datasets import item_rows, write_dataset
from tests.recsys.em3_runs import em3_config
from tests.recsys.serving.serving_runs import exported, requests

NEW = [100, 101, 102]  # rows 30, 31, 32 of the table; row 33 is that of unknown ids
EDITED, UNCHANGED = 5, 7
FULL = 33  # ids that the table holds
WIDTH = 16 * 5  # content vector and mean token of four modalities


def config_of(folder: Path) -> Any:
    config: Any = em3_config(folder)
    settings = {"encoder": "random:vit", "image_size": 32, "training": "side"}
    poster = ModalitySettings("image", "poster", **settings)
    words = ModalitySettings("terms", "text", training="full", embedding_dim=8)
    modalities = config.content.modalities | {"poster": poster, "words": words}
    content = replace(config.content, modalities=modalities)
    return replace(config, content=content)


def dataset(folder: Path) -> Path:
    """The small dataset with raw ids of items: a table with rows for three more."""
    data = write_dataset(folder / "data")
    schema = data / "schema.yaml"
    exact = f"num_embeddings: {FULL + 1}, vocabulary: {{kind: exact}}"
    schema.write_text(schema.read_text().replace("num_embeddings: 30", exact))
    prepare_vocabularies(str(data))
    return data


def new_items(data: Path, ids: list[int]) -> pa.Table:
    """Items of these ids with content of their own; the last has neither text nor poster."""
    table = item_rows(len(ids), np.random.default_rng(7)).drop_columns(["item"])
    columns = {name: table[name].to_pylist() for name in table.column_names}
    columns["text"] = ["a green car", *columns["text"][1:-1], None]
    columns["poster"][-1] = None
    like = pq.read_table(data / "items").schema
    return pa.table({"item": ids, **columns}, schema=like)


def edited_items(data: Path) -> pa.Table:
    """One item with another text, and one as it is."""
    table = pq.read_table(data / "items").to_pylist()
    rows = {row["item"]: row for row in table}
    edited = rows[EDITED] | {"text": "another house"}
    return pa.Table.from_pylist([edited, rows[UNCHANGED]], pq.read_table(data / "items").schema)


def run_with_new_items(session_folder: Path) -> Path:
    """Data, run, package, and a file of items: three are new, one is edited, one is as it was.

    They are made once for all tests; do not change them.
    """
    folder = session_folder / "added"
    with FileLock(session_folder / "added.lock"):
        if not (file := folder / "new" / "items.parquet").exists():
            data = dataset(folder)
            exported(folder, config_of(folder))
            file.parent.mkdir()
            pq.write_table(pa.concat_tables([new_items(data, NEW), edited_items(data)]), file)
    return folder


@pytest.fixture(scope="module")
def run(session_folder: Path) -> Path:
    return run_with_new_items(session_folder)


@pytest.fixture
def package(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run / "package", tmp_path / "package"))


def impressions(run: Path) -> pa.Table:
    """The test rows with new and edited items, ranked and in histories."""
    table = pq.read_table(run / "data" / "test")
    ids = itertools.cycle([*NEW, EDITED, UNCHANGED])
    rows = table.to_pylist()
    for row, item in zip(rows, ids):
        row["item"] = item
        row["history"], row["history_liked"] = [*NEW, EDITED, 3], [1.0, 0.0, 1.0, 0.0, 1.0]
    return pa.Table.from_pylist(rows, table.schema)


def predictions(run: Path, folder: Path) -> np.ndarray:
    """What `predict` makes of the impressions with the items in `items/`."""
    data = Path(shutil.copytree(run / "data", folder / "data"))
    rows = [row for row in pq.read_table(data / "items").to_pylist() if row["item"] != EDITED]
    like = pq.read_table(data / "items").schema
    pq.write_table(pa.Table.from_pylist(rows, like), data / "items" / "part-0.parquet")
    new = pq.read_table(run / "new" / "items.parquet").slice(0, len(NEW) + 1)
    pq.write_table(new, data / "items" / "part-1.parquet")
    prepare_vocabularies(str(data))
    pq.write_table(impressions(run), folder / "input.parquet")
    out = folder / "out.parquet"
    with joined_ranks("cpu") as ranks:
        predict(run / "run", [str(folder / "input.parquet")], out, str(data), ranks, "cpu")
    return pq.read_table(out)["prediction_liked"].to_numpy()


def scores(package: Path, run: Path) -> np.ndarray:
    scorer, folder = Scorer.load(package), package.parent / "asked"
    (folder / "test").mkdir(parents=True, exist_ok=True)
    pq.write_table(impressions(run), folder / "test" / "part-0.parquet")
    return np.concatenate([scorer.score(**request)[:, 0] for request in requests(folder)])


def test_added_items_score_as_predict_with_them_in_items(
    run: Path, package: Path, tmp_path: Path
) -> None:
    counts = add_items(package, str(run / "new" / "items.parquet"))

    assert counts == AddedCounts(new=3, changed=1, unchanged=1, without_row=0)
    np.testing.assert_allclose(scores(package, run), predictions(run, tmp_path), rtol=0, atol=1e-6)
    again = add_items(package, str(run / "new" / "items.parquet"))
    assert again == AddedCounts(new=0, changed=0, unchanged=5, without_row=0)


def test_an_item_beyond_the_table_has_its_content_and_the_id_of_unknown_items(
    run: Path, package: Path, tmp_path: Path
) -> None:
    table = package / "tables" / "item.vectors"
    rows = np.fromfile(table, np.uint8).reshape(FULL + 1, -1)
    rows[FULL - 1] = rows[FULL]  # the last item within the table has the vector of unknown ids
    rows.tofile(table)
    manifest = read_manifest(package, verify=False)
    (package / "manifest.json").unlink()
    write_manifest(package, manifest)
    items = new_items(run / "data", [*NEW, 103])
    twins = pa.concat_tables([items.slice(0, 2), items.slice(1, 1), items.slice(1, 1)])
    twins = twins.set_column(0, "item", pa.array([*NEW, 103]))  # 102 and 103 are of one content
    pq.write_table(twins, tmp_path / "twins.parquet")

    counts = add_items(package, str(tmp_path / "twins.parquet"))

    assert counts == AddedCounts(new=4, changed=0, unchanged=0, without_row=1)
    request = next(requests(run / "data"))
    scorer, history = Scorer.load(package), {"history_liked": [1.0, 0.0]}
    inside = scorer.score(request["user"], history | {"history": [102, 3]}, [102, 4, 101])
    beyond = scorer.score(request["user"], history | {"history": [103, 3]}, [103, 4, 101])
    unknown = scorer.score(request["user"], history | {"history": [999, 3]}, [999, 4, 101])
    np.testing.assert_array_equal(inside, beyond)
    assert not np.allclose(beyond, unknown)


class Killed(BaseException):
    """Stands for the end of the process: no cleanup runs after it."""


def kill_at_call(patch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Ends the process at the call of this number that writes after encoding; lists the calls."""
    calls: list[str] = []
    encode, encoded = ItemEncoder.encode, []

    def noted(*arguments: Any) -> torch.Tensor:
        encoded.append(True)
        return encode(*arguments)

    patch.setattr(ItemEncoder, "encode", noted)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.extend([name] if encoded else [])
            if len(calls) == number:
                patch.setattr(shutil, "rmtree", lambda *ignored, **also: None)
                patch.setattr(Path, "unlink", lambda *ignored, **also: None)
                raise Killed
            return function(*arguments, **options)

        return call

    for owner, name in (
        (np, "save"),
        (pq, "write_table"),
        (added_items, "write_vectors"),
        (Path, "rename"),
        (Path, "replace"),
        (os, "fsync"),
    ):
        patch.setattr(owner, name, counted(name, getattr(owner, name)))
    return calls


@pytest.fixture
def without_encoders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Content vectors of no meaning, which take no time; folders that are left are in tmp_path."""
    monkeypatch.setattr(ItemEncoder, "encode", lambda self, store, ids: torch.rand(len(ids), WIDTH))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_a_killed_process_leaves_the_package_whole_and_the_next_addition_works(
    run: Path, package: Path, tmp_path: Path, without_encoders: None
) -> None:
    files = pq.read_table(run / "new" / "items.parquet"), tmp_path / "part.parquet"
    pq.write_table(files[0].slice(0, 1), files[1])
    add_items(package, str(files[1]))
    pq.write_table(files[0].slice(1), files[1])
    old_manifest = read_manifest(package)
    for number in itertools.count(1):
        with pytest.MonkeyPatch.context() as patch:
            calls = kill_at_call(patch, number)
            with suppress(Killed):
                add_items(package, str(files[1]))
                break
        assert read_manifest(package) == old_manifest, calls
        assert list(AddedItems.open(package, old_manifest.added).ids) == [pa.scalar(NEW[0])]

    assert {"save", "write_table", "write_vectors", "rename", "replace", "fsync"} <= {*calls}
    manifest = read_manifest(package)
    items = AddedItems.open(package, manifest.added)
    assert items.ids.to_pylist() == NEW and len(items.index) == len(NEW) + 1
    assert {path.name for path in (package / "added").iterdir()} == {"1", "2"}
    Scorer.load(package)


def test_processes_that_add_at_once_lose_nothing(
    run: Path, package: Path, tmp_path: Path, without_encoders: None
) -> None:
    items, threads = pq.read_table(run / "new" / "items.parquet"), []
    for index in range(len(NEW)):
        file = tmp_path / f"{index}.parquet"
        pq.write_table(items.slice(index, 1), file)
        threads.append(threading.Thread(target=add_items, args=(package, str(file))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(AddedItems.open(package, read_manifest(package).added).ids.to_pylist()) == NEW


def test_items_go_into_one_package_whatever_a_link_names_later(
    package: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest of the older package took the place of the newer one's."""
    newer, link = Path(shutil.copytree(package, package.parent / "newer")), package.parent / "link"
    link.symlink_to(package)
    encode = ItemEncoder.encode

    def exchange_and_encode(*arguments: Any) -> torch.Tensor:
        link.unlink()
        link.symlink_to(newer)
        return encode(*arguments)

    monkeypatch.setattr(ItemEncoder, "encode", exchange_and_encode)
    add_items(link, str(run / "new"))
    assert read_manifest(package).added and not read_manifest(newer).added


@pytest.mark.parametrize("file_name", ["added/1/content.vectors", "items/weights.safetensors"])
def test_a_damaged_file_of_items_is_refused_by_name(
    run: Path, package: Path, without_encoders: None, file_name: str
) -> None:
    items = str(run / "new" / "items.parquet")
    add_items(package, items)
    content = bytearray((package / file_name).read_bytes())
    content[-1] ^= 1
    (package / file_name).write_bytes(content)

    with pytest.raises(ValueError, match=str(package / file_name)):
        Scorer.load(package)
    with pytest.raises(ValueError, match=str(package / file_name)):
        add_items(package, items)


def files_of(package: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in package.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("item", [100, None, 102], "'item', row 1"),
        ("clip", [None, [0.5, 0.5], None], "'clip', row 1"),
        ("item", ["a", "b", "c"], "'item'"),
        ("clip", None, "'clip'"),
    ],
)
def test_bad_rows_are_refused_by_file_column_and_row_and_nothing_is_written(
    run: Path, package: Path, tmp_path: Path, column: str, values: Any, message: str
) -> None:
    items, file = new_items(run / "data", NEW), tmp_path / "bad.parquet"
    index = items.schema.get_field_index(column)
    kind = None if column in ("text", "item") else items.schema.field(column).type
    items = items.drop_columns([column])
    if values is not None:
        items = items.add_column(index, column, pa.array(values, kind))
    pq.write_table(items, file)
    old_files = files_of(package)

    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        add_items(package, str(file))

    assert {
        name: content for name, content in files_of(package).items() if ".lock" not in name
    } == old_files


def test_features_that_are_added_again_do_not_change(package: Path, tmp_path: Path) -> None:
    """They were content once that lacks its columns; a second row of an item is refused."""
    schema, file = package / "schema.yaml", tmp_path / "new.parquet"
    manifest = read_manifest(package)
    content = yaml.safe_load(schema.read_text())
    content["schema"]["features"] = [{"by": ["item"], "columns": ["price", "since"]}]
    schema.write_text(yaml.safe_dump(content))
    table = load_run_schema(package).features[0]
    moments = pa.array([0], pa.timestamp("us"))
    stored = pa.table({"item": [5], "price": [1.0], "since": moments})
    path = features_file(package, table)
    path.parent.mkdir()
    with (
        pa.OSFile(str(path), "wb") as out,
        pa.ipc.new_file(out, stored.schema) as writer,
    ):
        writer.write_table(stored)
    (package / "manifest.json").unlink()
    write_manifest(package, manifest)
    item = {"item": 5, "price": 2.0, "since": "1970-01-01 00:00:07"}  # JSON has times as text
    assert ItemIntake(package).add([item]) == AddedCounts(features=1)
    assert ItemIntake(package).add([item]) == AddedCounts(features=0)
    features = AddedItems.open(package, read_manifest(package).added).features
    assert features is not None
    assert features.to_pylist() == [item | {"since": datetime(1970, 1, 1, second=7)}]
    pq.write_table(pa.table({"item": [5, 5], "price": [2.0, 3.0]}), file)
    with pytest.raises(ValueError, match=r"column 'item': an item has several rows"):
        add_items(package, str(file))
