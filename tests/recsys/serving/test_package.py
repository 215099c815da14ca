"""A package is whole and unchanged, or refused with the name of the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from embeddings.vocabulary.bounded import BoundedVocabulary
from recsys.data.schema import Schema
from recsys.data.schema_columns import Column, VocabularySettings
from recsys.distributed.ranks import joined_ranks
from recsys.serving.export import save_bounded
from recsys.serving.package import (
    MANIFEST,
    Manifest,
    read_manifest,
    read_manifest_of,
    write_manifest,
)
from recsys.serving.retrieval.item_vectors import VectorsManifest
from recsys.serving.scorer import load_bounded
from recsys.serving.vector_file import VectorFile, VectorFileShape, write_vectors


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
    about = VectorsManifest, "folder of vectors", "recsys export-vectors"
    with pytest.raises(ValueError, match=r"manifest\.json.*recsys export-vectors"):
        read_manifest_of(tmp_path / "package", *about, verify=True)


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
