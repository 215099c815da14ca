"""The runs that warm starts of these tests begin from, each trained once for all workers."""

import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.recsys.checkpoint.warm_start.warm_runs import WITHOUT_CONTENT, write_run


def run_in(factory: pytest.TempPathFactory, name: str, *argv: str) -> Path:
    """A folder with `data` and a `run`, whichever worker asks first."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(base / f"{name}.lock"):
        if not (base / name / "run" / "metrics.json").exists():
            write_run(base / name, *argv)
    return base / name


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without content."""
    return run_in(tmp_path_factory, "warm_plain", *WITHOUT_CONTENT, "--epochs", "2")


@pytest.fixture(scope="session")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with content."""
    return run_in(tmp_path_factory, "warm_multimodal")
