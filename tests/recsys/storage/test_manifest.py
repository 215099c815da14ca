"""Files of a package are compared with their hashes, all blocks at once or in a thread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recsys.storage import manifest
from recsys.storage.manifest import BackgroundCheck, VerifiedFiles, describe, differences

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


def test_whole_files_have_no_differences(tmp_path: Path, files: manifest.Files) -> None:
    assert files["item"]["bytes"] == 100 * BLOCKS - 7 and len(files["item"]["sha256"]) == BLOCKS
    choices: tuple[manifest.Verify, ...] = (True, False, "sample")
    for verify in choices:
        assert list(differences(tmp_path, files, verify)) == []
    check = BackgroundCheck(tmp_path, files)
    check.join()
    assert check.difference is None


@pytest.mark.parametrize("place", [0, 1234, 100 * BLOCKS - 8])
def test_one_bit_is_seen_by_a_whole_check_and_at_the_ends_by_a_sample(
    tmp_path: Path, files: manifest.Files, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "item"
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)

    assert [str(path) in line for line in differences(tmp_path, files)] == [True]
    assert list(differences(tmp_path, files, False)) == []
    if place != 1234:
        assert len(list(differences(tmp_path, files, "sample"))) == 1
    check = BackgroundCheck(tmp_path, files)
    check.join()
    assert check.difference is not None and str(path) in check.difference
    assert check.difference in caplog.text


def test_files_that_are_exchanged_or_cut_short_are_seen_by_a_sample(
    tmp_path: Path, files: manifest.Files
) -> None:
    (tmp_path / "item").rename(tmp_path / "other")
    (tmp_path / "user").rename(tmp_path / "item")
    (tmp_path / "other").rename(tmp_path / "user")
    assert len(list(differences(tmp_path, files, "sample"))) == 2
    (tmp_path / "user").write_bytes((tmp_path / "user").read_bytes()[:-1])
    (tmp_path / "empty").unlink()
    assert len(list(differences(tmp_path, files, False))) == 2


def test_a_file_that_is_gone_while_it_is_compared_is_a_difference(
    tmp_path: Path, files: manifest.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: Path, block: int) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(manifest, "_digest", gone)
    check = BackgroundCheck(tmp_path, files)
    check.join()
    assert check.difference is not None and "item" in check.difference


def test_files_that_were_compared_are_read_again_only_if_they_changed(
    tmp_path: Path, files: manifest.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, digest = list[str](), manifest._digest

    def noted(path: Path, block: int) -> str:
        read.append(path.name)
        return digest(path, block)

    monkeypatch.setattr(manifest, "_digest", noted)
    first = VerifiedFiles()
    assert list(differences(tmp_path, files, "sample", first)) == []
    assert list(differences(tmp_path, files, True, first)) == []  # a sample is no whole check
    assert read.count("item") == manifest.SAMPLED_BLOCKS + BLOCKS

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
