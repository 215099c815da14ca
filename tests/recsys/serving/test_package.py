"""Packages: files that differ are refused, and deltas make one of another."""

import json
import logging
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embeddings.vocabulary.bounded import BoundedVocabulary
from recsys.build import Job
from recsys.data.schema import Schema
from recsys.data.schema_columns import Column, VocabularySettings
from recsys.distributed.ranks import joined_ranks
from recsys.serving.delta import apply_delta, bytes_of_rows, write_delta
from recsys.serving.export import save_bounded, write_statistics
from recsys.serving.new_items.added_items import INDEX_TYPE, AddedItems
from recsys.serving.package import (
    MANIFEST,
    REQUEST,
    Manifest,
    read_manifest,
    read_manifest_of,
    write_manifest,
)
from recsys.serving.retrieval.item_vectors import VectorsManifest
from recsys.serving.scorer import load_bounded
from recsys.serving.vector_file import VectorFile, VectorFileShape, write_vectors
from recsys.storage.location import Location


def write_package(folder: Path) -> None:
    folder.mkdir()
    (folder / "graph.pt2").write_bytes(b"a graph")
    (folder / "tables").mkdir()
    (folder / "tables" / "item.vectors").write_bytes(b"vectors")
    manifest = Manifest(
        "runs/shop", "din", ["liked"], [], [], [], "item", None, {}, {}, False, [], {}, "today"
    )
    write_manifest(folder, manifest)


def test_a_file_that_differs_is_refused_by_name(tmp_path: Path) -> None:
    folder, path = tmp_path / "package", tmp_path / "package" / "tables" / "item.vectors"
    write_package(folder)
    assert read_manifest(folder).labels == ["liked"]
    path.write_bytes(path.read_bytes()[::-1])

    assert read_manifest(folder, verify=False).labels == ["liked"]
    with pytest.raises(ValueError, match=str(path)):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 2}', "[" * 100_000])
def test_a_damaged_manifest_is_refused_by_name(tmp_path: Path, text: str) -> None:
    write_package(tmp_path / "package")
    path = tmp_path / "package" / MANIFEST
    path.write_text(text)

    with pytest.raises(ValueError, match=str(path)):
        read_manifest(tmp_path / "package")


@pytest.mark.parametrize(
    "change", [{"labels": ["bought"]}, {"dense": 7}, {"more": 1}, {"sha256": 1}]
)
def test_an_edited_manifest_is_refused_by_name(tmp_path: Path, change: dict[str, object]) -> None:
    write_package(tmp_path / "package")
    path = tmp_path / "package" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(ValueError, match=f"{path}.*hash"):
        read_manifest(tmp_path / "package")


def test_a_folder_of_another_command_is_refused_with_the_command_that_makes_one(
    tmp_path: Path,
) -> None:
    write_package(tmp_path / "package")
    with pytest.raises(ValueError, match=r"manifest\.json.*recsys export-vectors"):
        read_manifest_of(VectorsManifest, tmp_path / "package")


def statistics_of_ages(tmp_path: Path, *files: pa.Array) -> dict[str, dict[str, float]]:
    columns = {"item": Column("id", num_embeddings=3), "age": Column("dense")}
    schema = Schema("item", "item", columns | {"liked": Column("label")})
    (tmp_path / "train").mkdir()
    for number, ages in enumerate(files):
        rows = pa.table({"item": np.arange(len(ages)), "age": ages})
        pq.write_table(rows, tmp_path / "train" / f"part-{number}.parquet")
    source = SimpleNamespace(source=SimpleNamespace(name="parquet"))
    job = SimpleNamespace(
        root=Location.of(tmp_path), train_folder="train", schema=schema, config=source
    )
    write_statistics(cast(Job, job), ["age"], tmp_path)
    return json.loads((tmp_path / "statistics.json").read_text())  # type: ignore[no-any-return]


def test_skipped_rows_are_not_in_the_range_of_numbers(tmp_path: Path) -> None:
    statistics = statistics_of_ages(tmp_path, pa.array([30.0, float("nan"), 20.0]))
    assert statistics == {"age": {"low": 20.0, "high": 30.0, "null": 0.0}}


def test_statistics_are_of_training_files_of_different_types(tmp_path: Path) -> None:
    statistics = statistics_of_ages(tmp_path, pa.array([30.0, 20.0]), pa.array([40, None]))
    assert statistics == {"age": {"low": 20.0, "high": 40.0, "null": 0.25}}


@pytest.mark.parametrize(
    ("stored_as", "error"), [("fp32", 0.0), ("fp16", 1e-3), ("int8", 0.01), ("int4", 0.2)]
)
def test_vectors_come_back_as_stored(tmp_path: Path, stored_as: str, error: float) -> None:
    vectors = torch.rand(50, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shape = VectorFileShape(50, 8, stored_as)  # type: ignore[arg-type]
    write_vectors(tmp_path / "item.vectors", shape, vectors.split(7))
    file, ids = VectorFile(tmp_path / "item.vectors", shape), np.array([3, 49, 3])

    assert (tmp_path / "item.vectors").stat().st_size == 50 * shape.row_bytes
    torch.testing.assert_close(file.rows(ids), vectors[ids], rtol=0, atol=error)
    assert file.rows(ids[:0]).shape == (0, 8)


def test_the_map_of_a_job_is_loaded_by_a_process_without_one(tmp_path: Path) -> None:
    settings = VocabularySettings("bounded")
    shop = Column("id", num_embeddings=6, vocabulary=settings)
    schema = Schema("item", None, {"item": Column("id", num_embeddings=3), "shop": shop})
    ids = torch.tensor([90, 2**40, 90])
    with joined_ranks("cpu") as ranks:
        learned = BoundedVocabulary(6, process_group=ranks.group)
        expected = learned.rows_of(ids, step=0, training=True)
        save_bounded(tmp_path, "shop", learned)

    loaded = load_bounded(tmp_path, "shop", schema)

    assert torch.equal(loaded.rows_of(ids, step=0, training=False), expected)
    assert expected.unique().numel() == 2


TABLE, CONTENT = "tables/item.vectors", "content/history.vectors"
Edit = Callable[[Path, Manifest], Manifest]


def edited(package: Path, folder: Path, edit: Edit) -> Path:
    """Copy a package and change it."""
    shutil.copytree(package, folder)
    manifest = edit(folder, read_manifest(folder))
    (folder / MANIFEST).unlink()
    write_manifest(folder, manifest)
    return folder


def trained(folder: Path, manifest: Manifest) -> Manifest:
    """Change two rows of a table, add one to the content vectors, and write another request."""
    row_bytes = bytes_of_rows(manifest)
    content = bytearray((folder / TABLE).read_bytes())
    for row in (3, 7):
        content[row * row_bytes[TABLE]] ^= 1
    (folder / TABLE).write_bytes(content)
    with (folder / CONTENT).open("ab") as file:
        file.write(bytes(row_bytes[CONTENT]))
    (folder / REQUEST).write_text("{}")
    grown = dict(manifest.content["history"])
    grown["num_rows"] += 1
    return replace(manifest, content=manifest.content | {"history": grown})


def with_two_items(folder: Path, manifest: Manifest) -> Manifest:
    """Add two items as `add-items` does."""
    index = np.zeros(2, INDEX_TYPE)
    index["item"] = [100, 101]
    vectors, ids = torch.zeros(2, manifest.content["history"]["dim"]), pa.array([100, 101])
    previous = AddedItems.open(folder, manifest.added)
    return previous.write_next(folder, manifest, index, vectors, ids)


def files_of(folder: Path) -> dict[str, bytes]:
    names = [MANIFEST, *read_manifest(folder).files]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture
def package(package_run: tuple[Path, Path, np.ndarray]) -> Path:
    return package_run[1]


@pytest.fixture
def newer(package: Path, tmp_path: Path) -> Path:
    return edited(package, tmp_path / "newer", trained)


@pytest.fixture
def delta(package: Path, newer: Path, tmp_path: Path) -> Path:
    write_delta(package, newer, tmp_path / "delta")
    return tmp_path / "delta"


def test_the_older_package_and_a_delta_of_its_changed_rows_make_the_newer_one(
    package: Path, newer: Path, tmp_path: Path
) -> None:
    old_files, delta = files_of(package), tmp_path / "delta"

    counts = write_delta(package, newer, delta)

    assert (counts.rows, counts.full_files) == ({TABLE: 2, CONTENT: 1}, [REQUEST])
    with zipfile.ZipFile(delta) as archive, archive.open(f"rows/{TABLE}") as rows:
        assert np.load(rows).tolist() == [3, 7]
    apply_delta(package, delta, tmp_path / "made")

    assert files_of(tmp_path / "made") == files_of(newer)
    assert files_of(package) == old_files


def test_a_table_of_fewer_rows_is_cut(package: Path, newer: Path, tmp_path: Path) -> None:
    assert write_delta(newer, package, tmp_path / "back").rows == {TABLE: 2, CONTENT: 0}
    apply_delta(newer, tmp_path / "back", tmp_path / "made")
    assert files_of(tmp_path / "made") == files_of(package)


def test_another_older_package_is_refused_by_the_file_that_differs(
    newer: Path, delta: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{CONTENT}.*{delta}"):
        apply_delta(newer, delta, tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("position", [100, 0.5, -30])
def test_a_damaged_delta_is_refused_and_nothing_is_written(
    package: Path, delta: Path, tmp_path: Path, position: float
) -> None:
    content = bytearray(delta.read_bytes())
    offset = int(position * len(content)) if position == 0.5 else int(position)
    content[offset] ^= 255
    delta.write_bytes(content)
    with pytest.raises(ValueError, match=str(delta)):
        apply_delta(package, delta, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_folder_that_exists_and_a_missing_delta_are_refused(
    package: Path, newer: Path, delta: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=str(newer)):
        apply_delta(package, delta, newer)
    with pytest.raises(ValueError, match="none"):
        apply_delta(package, tmp_path / "none", tmp_path / "made")


def test_items_that_were_added_to_the_older_package_alone_are_counted(
    package: Path, newer: Path, delta: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    serving = edited(package, tmp_path / "serving", with_two_items)
    with caplog.at_level(logging.WARNING):
        apply_delta(serving, delta, tmp_path / "made")
    assert f"{serving}: 2 items" in caplog.text
    assert files_of(tmp_path / "made") == files_of(newer)
