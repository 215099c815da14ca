"""Files of a package are compared with their hashes, block by block."""

from pathlib import Path

import numpy as np
import pytest

from recsys.storage import manifest
from recsys.storage.manifest import VerifiedFiles, describe, differences

BLOCKS = 40


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, object]]:
    """Two files of many blocks, the last one short, and an empty one."""
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 100)
    random = np.random.default_rng(0)
    for name in ("item", "user"):
        (tmp_path / name).write_bytes(random.bytes(100 * BLOCKS - 7))
    (tmp_path / "empty").touch()
    return {name: describe(tmp_path / name) for name in ("item", "user", "empty")}


@pytest.mark.parametrize("byte", [0, 1234, 100 * BLOCKS - 8])
def test_one_bit_is_seen_by_the_hashes(tmp_path: Path, files: manifest.Files, byte: int) -> None:
    path = tmp_path / "item"
    content = bytearray(path.read_bytes())
    content[byte] ^= 4
    path.write_bytes(content)

    assert [str(path) in line for line in differences(tmp_path, files)] == [True]
    assert list(differences(tmp_path, files, False)) == []


def test_files_that_are_cut_short_or_removed_are_seen_by_their_sizes(
    tmp_path: Path, files: manifest.Files
) -> None:
    (tmp_path / "user").write_bytes((tmp_path / "user").read_bytes()[:-1])
    (tmp_path / "empty").unlink()
    assert len(list(differences(tmp_path, files, False))) == 2


def test_files_that_were_compared_are_read_again_only_if_they_changed(
    tmp_path: Path, files: manifest.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, digest = list[str](), manifest._digest

    def noted(path: Path, block: int) -> str:
        read.append(path.name)
        return digest(path, block)

    monkeypatch.setattr(manifest, "_digest", noted)
    first = VerifiedFiles()
    assert list(differences(tmp_path, files, False, first)) == []
    assert list(differences(tmp_path, files, True, first)) == []  # sizes are no whole check
    assert read.count("item") == BLOCKS

    (tmp_path / "copy").write_bytes((tmp_path / "user").read_bytes())
    (tmp_path / "copy").replace(tmp_path / "user")
    read.clear()
    second = VerifiedFiles(first)
    assert list(differences(tmp_path, files, True, second)) == []
    assert set(read) == {"user"} and first.identities != second.identities

    content = bytearray((tmp_path / "item").read_bytes())
    content[1234] ^= 4
    (tmp_path / "item").write_bytes(content)
    assert len(list(differences(tmp_path, files, True, VerifiedFiles(second)))) == 1
