"""The walks that tests compare with or go on from, each made once for all workers."""

import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from tests.recsys.training.continual.walk_runs import NAMES, WITHOUT_CONTENT, walk, write_walk


def walked_in(factory: pytest.TempPathFactory, name: str, count: int, *argv: str) -> Path:
    """A folder with `data` and the `run` that walked it, whichever worker asks first."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / name
    with FileLock(base / f"{name}.lock"):
        if not (folder / "done").exists():
            write_walk(folder / "data", count)
            state = walk(folder, folder / "run", *argv)
            assert [trained.name for trained in state.trained] == NAMES[:count]
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="session")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four partitions, walked with content."""
    return walked_in(tmp_path_factory, "walked", len(NAMES))


@pytest.fixture
def two(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A copy of two partitions, walked without content."""
    folder = walked_in(tmp_path_factory, "walked_two", 2, *WITHOUT_CONTENT)
    return shutil.copytree(folder, tmp_path / "two")
