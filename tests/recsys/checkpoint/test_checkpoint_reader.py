"""What lies in a checkpoint's folder is data: nothing in it runs when it is read."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from recsys.checkpoint.reader import SafeFileSystemReader


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state = {"weight": torch.arange(6.0).reshape(2, 3), "ids": torch.tensor([1, 2])}
    dcp.save(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    return tmp_path / "checkpoint"


class Evil:
    """Unpickled without restriction, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_code_in_the_metadata_does_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ValueError, match=r"\.metadata: .*posix\.mkdir"):
        SafeFileSystemReader(folder).read_metadata()
    assert not mark.exists()
    with pytest.raises(AttributeError):  # the library itself runs it before it stumbles
        dcp.FileSystemReader(folder).read_metadata()
    assert mark.exists()


def test_entries_that_are_not_tensors_are_refused(tmp_path: Path) -> None:
    dcp.save({"step": 3}, checkpoint_id=tmp_path / "other", no_dist=True)
    with pytest.raises(ValueError, match="entry 'step'"):
        SafeFileSystemReader(tmp_path / "other").read_metadata()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"text", pickle.dumps({"a": 1})])
def test_damaged_metadata_is_a_clear_error(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata: "):
        SafeFileSystemReader(folder).read_metadata()


def test_a_tensor_file_with_other_objects_is_not_unpickled(folder: Path, tmp_path: Path) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    place = next(iter(metadata.storage_data.values()))
    file, mark = folder / place.relative_path, tmp_path / "mark"
    with (tmp_path / "evil").open("wb") as stream:
        torch.save(Evil(mark), stream)
    evil = (tmp_path / "evil").read_bytes()
    file.write_bytes(evil)
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, len(evil)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    state = {"weight": torch.zeros(2, 3)}
    with pytest.raises(CheckpointException, match="Weights only"):
        dcp.load(state, storage_reader=SafeFileSystemReader(folder), no_dist=True)
    assert not mark.exists()
