"""A delta and the older package make the newer package, equal to the last bit."""

from __future__ import annotations

import logging
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.serving.delta import apply_delta, bytes_of_rows, write_delta
from recsys.serving.new_items.added_items import INDEX_TYPE, AddedItems
from recsys.serving.package import MANIFEST, REQUEST, Manifest, read_manifest, write_manifest
from recsys.serving.vector_file import VectorFileShape

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
    shape = replace(VectorFileShape(**manifest.content["history"]), num_rows=2)
    vectors, ids = torch.zeros(2, shape.dim), pa.array([100, 101])
    addition = AddedItems.open(folder, manifest.added).write_next(
        folder, index, vectors, ids, shape
    )
    return replace(manifest, added=addition)


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
    before, delta = files_of(package), tmp_path / "delta"

    counts = write_delta(package, newer, delta)

    assert (counts.rows, counts.whole) == ({TABLE: 2, CONTENT: 1}, [REQUEST])
    with zipfile.ZipFile(delta) as archive, archive.open(f"rows/{TABLE}") as rows:
        assert np.load(rows).tolist() == [3, 7]
    apply_delta(package, delta, tmp_path / "made")

    assert files_of(tmp_path / "made") == files_of(newer)
    assert files_of(package) == before


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


@pytest.mark.parametrize("place", [100, 0.5, -30])
def test_a_damaged_delta_is_refused_and_nothing_is_written(
    package: Path, delta: Path, tmp_path: Path, place: float
) -> None:
    content = bytearray(delta.read_bytes())
    at = int(place * len(content)) if place == 0.5 else int(place)
    content[at] ^= 255
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
