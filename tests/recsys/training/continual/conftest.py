"""The walk that tests compare with, made once for all workers."""

import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.recsys.training.continual.walk_runs import NAMES, walk, write_walk


@pytest.fixture(scope="session")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` in four partitions and the `run` that walked them, with content."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / "walked"
    with FileLock(base / "walked.lock"):
        if not (folder / "run" / "done").exists():
            write_walk(folder / "data")
            state = walk(folder, folder / "run")
            assert [trained.name for trained in state.trained] == NAMES
            (folder / "run" / "done").touch()
    return folder
