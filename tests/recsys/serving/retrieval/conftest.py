"""The run that the tests of this folder share."""

import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.recsys.serving.retrieval.retrieval_runs import train_towers


@pytest.fixture(scope="session")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, its two-tower run, and the folder of its item vectors; do not change them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder inside that of the session
        folder = folder.parent
    with FileLock(folder / "towers.lock"):
        return train_towers(folder / "towers")
