"""Run a package's server in its own process."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys.serving import Scorer
from recsys.serving.package import REQUEST

START_SECONDS = 120


@contextmanager
def served(
    package: Path, verify: str = "false", workers: int = 1
) -> Iterator[tuple[int, int, int]]:
    """Start a server of one thread; yield its process id and the ports of HTTP and gRPC."""
    with _reserved_port() as port, _reserved_port() as grpc_port:
        yield from _served(package, verify, workers, port, grpc_port)


@contextmanager
def _reserved_port() -> Iterator[int]:
    """Yield a free port, which no other process is given until the end.

    The server, which sets SO_REUSEADDR as well, may listen on it, as this socket does not.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def _served(
    package: Path, verify: str, workers: int, port: int, grpc_port: int
) -> Iterator[tuple[int, int, int]]:
    command = [sys.executable, "-m", "recsys.cli", "serve", str(package), "--name", "package"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--grpc_port", str(grpc_port)]
    command += ["--threads", "1", "--log_level", "warning", "--verify", verify]
    command += ["--workers", str(workers), "--drain", "0"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_ready(port):
            assert process.poll() is None and time.monotonic() < deadline, command
            time.sleep(0.1)
        yield process.pid, port, grpc_port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(START_SECONDS)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def request_for(package: Path, scorer: Scorer, length: int, count: int) -> dict[str, Any]:
    """Return the package's example with random items in histories of L and N candidates."""
    rng, request = np.random.default_rng(0), json.loads((package / REQUEST).read_text())
    items = scorer.read.item_ids(limit=10**9)

    def drawn(number: int) -> list[Any]:
        return [items[index] for index in rng.integers(len(items), size=number)]

    for history in scorer.schema.histories:
        request["history"][history.name] = drawn(length)
        for name in history.numbers:
            request["history"][name] = rng.integers(2, size=length).astype(float).tolist()
    return request | {"candidates": drawn(count)}


class HTTPClient:
    """Ranks over one connection that is kept open."""

    def __init__(self, port: int, request: dict[str, Any]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._body = json.dumps(request)

    def __call__(self) -> bytes:
        self._connection.request("POST", "/v1/rank", self._body)
        response = self._connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        return body


def grpc_client(port: int, scorer: Scorer, request: dict[str, Any]) -> Callable[[], object]:
    """Return a call of the protocol with its tensors as bytes, by Triton's client."""
    from tritonclient.grpc import InferenceServerClient, InferInput
    from tritonclient.utils import np_to_triton_dtype

    client = InferenceServerClient(f"127.0.0.1:{port}")
    columns = {**request["user"], **request["history"]}
    columns[scorer.schema.target_item] = request["candidates"]
    inputs = []
    for name, value in columns.items():
        values = np.atleast_1d(value)
        if not len(values) or values.dtype == object:  # nothing is known, which the user leaves out
            continue
        values = values.astype(object) if values.dtype.kind == "U" else values
        inputs.append(InferInput(name, values.shape, np_to_triton_dtype(values.dtype)))
        inputs[-1].set_data_from_numpy(values)
    return lambda: client.infer("package", inputs)


def graph_call(scorer: Scorer, request: dict[str, Any]) -> Callable[[], object]:
    """Return a call of the exported graph alone, on inputs that are looked up already."""
    arguments = scorer._inputs(scorer.read(**request)).arguments()

    def call() -> object:
        with torch.inference_mode():
            return scorer._graph(*arguments)

    return call


def latencies(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:  # milliseconds, a value per round
    """Time each way once per round, after a tenth of the rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-max(1, rounds // 10), rounds):
        for name, call in calls.items():
            start = clock()
            call()
            if number >= 0:
                times[name].append((clock() - start) * 1e3)
    return {name: np.array(values) for name, values in times.items()}
