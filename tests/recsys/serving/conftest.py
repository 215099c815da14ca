"""Runs and their packages, made once for all tests of serving."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from recsys.config import NeighbourSettings
from tests.recsys.em3_runs import em3_config
from tests.recsys.serving.retrieval.retrieval_runs import train_towers
from tests.recsys.serving.serving_runs import exported


@pytest.fixture(scope="session")
def package_run(session_folder: Path) -> tuple[Path, Path, np.ndarray]:
    """The folder of dataset and run, the package, and the predictions of the test rows."""
    folder = session_folder / "served"
    with FileLock(session_folder / "served.lock"):
        if not (folder / "predictions.npy").exists():
            folder.mkdir()
            neighbours = NeighbourSettings("history_liked", dim=4, taste_dim=4)
            config = replace(em3_config(folder), neighbours=neighbours)
            _, predictions = exported(folder, config)
            np.save(folder / "predictions.npy", predictions)
    return folder, folder / "package", np.load(folder / "predictions.npy")


@pytest.fixture(scope="session")
def towers(session_folder: Path) -> Path:
    """A dataset, its two-tower run, and the folder of its item vectors; do not change them."""
    with FileLock(session_folder / "towers.lock"):
        return train_towers(session_folder / "towers")
