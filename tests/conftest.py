"""What tests of several rooms share, and the order in which test files run."""

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Read when torch is imported. Threads of several workers on few cores spend up to nine tenths of
# their processor time in waits for each other; what depends on threads sets their number itself.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

from recsys.distributed.log import PACKAGE_LOGGERS
from recsys.kernels.choice import _KernelChoice
from tests.ranks import require_gpus
from tests.rare_gc import collect_garbage_seldom
from tests.recsys.command_runs import TrainedRun, train_by_torchx

# A busy machine takes longer for an example, and longer to make one.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


_LOGGERS = [logging.getLogger(name) for name in PACKAGE_LOGGERS]
_LOGGERS_AT_START = [(log.handlers, log.propagate, log.level) for log in _LOGGERS]
_KERNELS_AT_START, _THREADS_AT_START = _KernelChoice.kernels, torch.get_num_threads()


def _restore_process() -> None:
    _KernelChoice.kernels = _KERNELS_AT_START
    torch.set_num_threads(_THREADS_AT_START)
    for logger, (handlers, propagate, level) in zip(_LOGGERS, _LOGGERS_AT_START, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """Jobs of a test, or of a module's fixture, set loggers and kernels: a test starts without."""
    _restore_process()
    yield
    _restore_process()


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device of a test: each test that asks runs on CPU, and under `-m gpu` on GPUs."""
    if request.param == "cuda":
        require_gpus(1)
    return request.param


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of the session share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def trained(session_folder: Path) -> TrainedRun:
    """A run over two ranks, trained once for all tests, whichever worker asks first."""
    with FileLock(session_folder / "trained.lock"):
        return train_by_torchx(session_folder / "trained")


def pytest_collectstart() -> None:
    """Test files import libraries: until all are there, nothing is garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    collect_garbage_seldom()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the pages and Spark first and the short files of `data` last, so that none ends long."""
    items.sort(key=lambda item: item.nodeid.startswith("tests/recsys/data/"))
    items.sort(key=lambda item: "open_spark" not in getattr(item, "fixturenames", ()))
    items.sort(key=lambda item: not item.nodeid.startswith("tests/test_readme.py"))
