"""A server of a package in a process of its own."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 120


@contextmanager
def served(
    package: Path, verify: str = "false", workers: int = 1
) -> Iterator[tuple[int, int, int]]:
    """Start a server of one thread; yield its process id and the ports of HTTP and gRPC."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    words = [sys.executable, "-m", "recsys.cli", "serve", str(package), "--name", "package"]
    words += ["--host", "127.0.0.1", "--port", str(ports[0]), "--grpc_port", str(ports[1])]
    words += ["--threads", "1", "--log_level", "warning", "--verify", verify]
    words += ["--workers", str(workers), "--drain", "0"]
    process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_ready(ports[0]):
            assert process.poll() is None and time.monotonic() < deadline, words
            time.sleep(0.1)
        yield process.pid, ports[0], ports[1]
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
