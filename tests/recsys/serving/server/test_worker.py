"""What a worker answers and counts, called in this process."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import uvicorn

from recsys.config.server import FeatureSettings, ServerSettings
from recsys.serving import Scorer
from recsys.serving.package import MANIFEST
from recsys.serving.server.http_app import Routes
from recsys.serving.server.scoring_service import LoadedPackage, ScoringService
from recsys.serving.server.worker import Workers

SHARE = """
import sys
from recsys.serving.server import metrics

metrics.TRAINING_SHARE.labels("city", "null").set(float(sys.argv[1]))
print(metrics.exposition().decode())
"""


def test_the_version_of_features_in_a_ranking_is_that_of_its_own_lookup() -> None:
    """A store names the version when it is read."""
    scorer = SimpleNamespace(labels=("bought",), features_version="yesterday")

    async def score(*_: Any) -> np.ndarray:
        scorer.features_version = "today"
        return np.zeros((1, 1), np.float32)

    async def body() -> AsyncIterator[bytes]:
        yield b'{"user": {}, "candidates": [1]}'

    package: Any = SimpleNamespace(scorer=scorer, version="1", columns=None)
    service: Any = SimpleNamespace(package=package, score=score, settings=ServerSettings("shop"))
    request: Any = SimpleNamespace(stream=body, state=SimpleNamespace(request_id="7"))
    response = asyncio.run(Routes(service).rank(request))
    assert json.loads(bytes(response.body))["features_version"] == "today"


def test_training_shares_are_those_of_workers_that_run(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for share in ("0.5", "0.1"):  # of the package of a worker that has ended, and of the next
        command = [sys.executable, "-W", "ignore", "-c", SHARE, share]
        text = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    assert b'recsys_training_share{column="city",kind="null"} 0.1\n' in text


def test_a_package_that_changes_while_it_is_loaded_is_loaded_anew(
    package_run: tuple[Path, Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each addition of items removes the files of the last one but one."""
    package = Path(shutil.copytree(package_run[1], tmp_path / "shop"))
    service = ScoringService(ServerSettings(str(package), threads=1))
    load = LoadedPackage.load

    def interrupted(*_: Any) -> None:
        monkeypatch.setattr(LoadedPackage, "load", load)
        os.utime(package / MANIFEST, (2, 2))
        raise ValueError("no such file")

    monkeypatch.setattr(LoadedPackage, "load", interrupted)
    os.utime(package / MANIFEST, (1, 1))
    old_package = service.package
    assert asyncio.run(service._take_newest())
    assert service.package is not old_package


def test_a_source_of_features_that_cannot_be_made_is_no_damaged_package(
    package_run: tuple[Path, Path, np.ndarray],
) -> None:
    with pytest.raises(ValueError, match=r"^features.name 'absent:Store' cannot be imported"):
        Scorer.load(package_run[1], verify=False, features=FeatureSettings("absent:Store"))


def test_the_pipe_of_a_worker_ends_with_the_worker() -> None:
    """Its supervisor waited a minute for the answer of one that was killed while it was asked."""
    parent_end, worker_end = Pipe()
    process: Any = SimpleNamespace(
        child_conn=worker_end, is_alive=lambda timeout: parent_end.poll()
    )
    workers = object.__new__(Workers)  # without the handlers of signals
    workers.processes, workers.should_exit = [process], threading.Event()
    workers.config = uvicorn.Config("app")
    workers.keep_subprocess_alive()
    with pytest.raises(EOFError):
        parent_end.recv()
