"""A run and its package, made once for all tests of serving."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from tests.recsys.serving.serving_runs import exported, small_config


@pytest.fixture(scope="session")
def package_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, np.ndarray]:
    """The folder of dataset and run, the package, and the predictions of the test rows."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder inside that of the session
        base = base.parent
    folder, package = base / "served", base / "served" / "package_fp32"
    with FileLock(base / "served.lock"):
        if not (folder / "predictions.npy").exists():
            folder.mkdir()
            _, predictions = exported(folder, small_config(folder))
            np.save(folder / "predictions.npy", predictions)
    return folder, package, np.load(folder / "predictions.npy")
