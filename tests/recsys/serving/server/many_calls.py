"""Calls of a server by its OpenAPI description, and its memory under many requests.

`python -m tests.recsys.serving.server.many_calls` makes 10,000 calls by schemathesis, of which none
may end with a status from 500 on, then 50,000 rankings of one user and of several. Memory is that
of all processes of the server without shared pages counted twice; its growth counts from the first
500 rankings on, in which threads, allocators and code start.
"""

import http.client
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from jsonargparse import auto_cli

from tests.recsys.em3_runs import em3_config
from tests.recsys.serving.server.served_package import TOKEN, ServedPackage
from tests.recsys.serving.serving_runs import exported

MAX_GROWTH = 0.05
BATCH_EVERY, ITEMS = 10, 30
WARM_UP = 500  # rankings


def describe_calls(server: ServedPackage, folder: Path, calls: int) -> tuple[int, str]:
    """Call each route up to `calls` times in each phase; return their number in all.

    Raises:
        AssertionError: an answer has a status from 500 on.
    """
    url = f"http://127.0.0.1:{server.port}/openapi.json"
    program = Path(sys.executable).with_name("schemathesis")
    argv = [str(program), "run", url, "-c", "not_a_server_error", "-n", str(calls)]
    argv += ["--phases", "examples,coverage,fuzzing", "-H", f"authorization: Bearer {TOKEN}"]
    process = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-5000:]
    return int(re.findall(r"(\d+) generated", process.stdout)[0]), process.stdout


def megabytes(server: ServedPackage) -> float:
    process = psutil.Process(server.process.pid)
    processes = [process, *process.children(recursive=True)]
    return sum(one.memory_full_info().pss for one in processes) / 1e6


def rank_often(server: ServedPackage, request: dict[str, Any], requests: int) -> list[float]:
    """Rank candidates of a user, and of several; return megabytes after warm-up and each tenth.

    Raises:
        AssertionError: an answer is no 200.
    """
    random, memory = np.random.default_rng(0), list[float]()
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    headers = {"authorization": f"Bearer {TOKEN}"}
    for number in range(1, requests + 1):
        path = "/v1/rank"
        one: dict[str, Any] = request | {"candidates": random.integers(0, ITEMS, 5).tolist()}
        if number % BATCH_EVERY == 0:
            path, one = "/v1/rank/batch", {"requests": [one] * 3}
        connection.request("POST", path, json.dumps(one), headers)
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        if number == WARM_UP or number % (requests // 10) == 0:
            memory.append(megabytes(server))
            print(f"{number:,} rankings, {memory[-1]:.1f} MB", flush=True)
    connection.close()
    return memory


def main(calls: int = 10_000, requests: int = 50_000, per_route: int = 1_200) -> None:
    """Make a package and call its server.

    Args:
        calls: least number of calls by the description
        requests: rankings
        per_route: calls of each route and phase
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package, _ = exported(folder, em3_config(folder))
        request = json.loads((package / "request.json").read_text())
        server = ServedPackage(package, folder / "log", "--encoders", "true")
        try:
            memory = rank_often(server, request, requests)
            number, output = describe_calls(server, folder, per_route)
        finally:
            server.end()
        print(output[-1500:])
        growth = memory[-1] / memory[0] - 1
        print(f"{number:,} calls without a server error; memory grows by {growth:.1%}")
        assert number >= calls, "raise --per_route"
        assert growth < MAX_GROWTH


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
