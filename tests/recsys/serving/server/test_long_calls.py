"""Servers that end, lose a worker, and are called by their own description."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.ranks import HANG_SECONDS
from tests.recsys.serving.server.served_package import TOKEN, ServedPackage
from tests.recsys.serving.serving_runs import requests

RANK = "/v1/rank"
OPEN, MANY = 6, 9_000  # open requests; candidates of each, for which they take a while
CALLS = 12  # of each route and phase


@pytest.fixture
def request_of_user(package_run: tuple[Path, Path, np.ndarray]) -> dict[str, Any]:
    request = next(requests(package_run[0] / "data"))
    request["user"] |= {"when": str(request["user"]["when"])}
    return request


@pytest.fixture
def server(package_run: tuple[Path, Path, np.ndarray], tmp_path: Path) -> Iterator[ServedPackage]:
    """A server of two workers."""
    server = ServedPackage(package_run[1], tmp_path / "log", "--workers", "2")
    yield server
    server.end()


@pytest.mark.long
def test_requests_that_are_open_are_answered_when_the_server_ends(
    package_run: tuple[Path, Path, np.ndarray], tmp_path: Path, request_of_user: dict[str, Any]
) -> None:
    server = ServedPackage(package_run[1], tmp_path / "log")
    request = request_of_user | {"candidates": [index % 30 for index in range(MANY)]}
    with ThreadPoolExecutor(OPEN) as threads:
        answers = [threads.submit(server.call, RANK, request) for _ in range(OPEN)]
        while server.metric("recsys_waiting_requests") < OPEN:
            assert not answers[0].done()
            time.sleep(0.01)

        assert server.end() == 0

    contents = [answer.result().content for answer in answers]
    assert [len(content["items"]) for content in contents] == [MANY] * OPEN


@pytest.mark.long
def test_a_worker_that_is_killed_is_replaced_and_the_others_answer(
    server: ServedPackage, request_of_user: dict[str, Any]
) -> None:
    server.wait_for(r"(?s)(ready, version.*){2}")
    assert server.metric("recsys_package_workers") == 2
    workers = [
        each
        for each in psutil.Process(server.process.pid).children()
        if "spawn_main" in " ".join(each.cmdline())
    ]
    assert len(workers) == 2

    os.kill(workers[0].pid, signal.SIGKILL)
    workers[0].wait(HANG_SECONDS)

    assert server.call(RANK, request_of_user).status == 200
    server.wait_for(r"(?s)(ready, version.*){3}")
    assert server.metric("recsys_package_workers") == 2
    assert {server.call(RANK, request_of_user).status for _ in range(20)} == {200}


@pytest.mark.long
def test_no_call_that_the_description_allows_or_forbids_fails_inside(
    package_run: tuple[Path, Path, np.ndarray], tmp_path: Path
) -> None:
    server = ServedPackage(package_run[1], tmp_path / "log")
    url = f"http://127.0.0.1:{server.port}/openapi.json"
    program = Path(sys.executable).with_name("schemathesis")
    words = [str(program), "run", url, "-c", "not_a_server_error", "-n", str(CALLS)]
    words += ["--phases", "examples,coverage,fuzzing", "-H", f"authorization: Bearer {TOKEN}"]
    try:
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    finally:
        server.end()

    assert done.returncode == 0, done.stdout[-5000:]
    assert int(re.findall(r"(\d+) generated", done.stdout)[0]) > 100
