"""A server in a process of its own, and plain HTTP calls of it."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.ranks import HANG_SECONDS

ROOT = Path(__file__).parents[4]
TOKEN = "of the tests"


class Response(NamedTuple):
    """Status, headers in lower case, and body of a response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> Any:
        """The body's JSON."""
        return json.loads(self.body)


class ServedPackage:
    """Starts `recsys serve` on free ports and waits until it is ready."""

    def __init__(self, package: Path, log: Path, *options: str) -> None:
        self.log = log
        argv = [sys.executable, "-W", "ignore", "-m", "recsys.cli", "serve", str(package)]
        argv += ["--name", "shop", "--port", "0", "--grpc_port", "0", "--threads", "1"]
        argv += ["--drain", "0", "--log_format", "json", *options]
        environment = {**os.environ, "RECSYS_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        try:
            self._wait()
        except BaseException:
            self.process.kill()
            raise

    def _wait(self) -> None:
        ports = self.wait_for(r"ready, version.*HTTP on 127.0.0.1:(\d+), gRPC on 127.0.0.1:(\d+)")
        self.port, self.grpc_port = int(ports[1]), int(ports[2])

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until the log has a line."""
        deadline = time.monotonic() + HANG_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if match := re.search(pattern, self.log.read_text()):
                return match
            time.sleep(0.05)
        pytest.fail(f"the log has no {pattern}: {self.log.read_text()[-3000:]}")

    def call(
        self, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> Response:
        """Send one request; anything but bytes is sent as JSON."""
        all_headers = {"authorization": f"Bearer {TOKEN}"}
        all_headers |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG_SECONDS)
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body)
            method = method or ("GET" if body is None else "POST")
            connection.request(method, path, content, all_headers)
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Response(response.status, names, response.read())
        finally:
            connection.close()

    def send(self, sent: bytes, port: int | None = None) -> bytes:
        """Send bytes as they are; returns what comes back until the server closes."""
        with socket.create_connection(("127.0.0.1", port or self.port), HANG_SECONDS) as connection:
            received = b""
            with suppress(ConnectionError):  # bytes that the server has not read reset it
                connection.sendall(sent)
                while chunk := connection.recv(2**16):
                    received += chunk
            return received

    def is_listening(self) -> bool:
        """Whether a connection can be made."""
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0

    def metric(self, name: str) -> float:
        """The sum of a metric's values."""
        lines = self.call("/metrics").body.decode().splitlines()
        values = [line.split() for line in lines if re.match(name + r"[{ ]", line)]
        return sum(float(value[-1]) for value in values)

    def end(self) -> int:
        """End the server as Kubernetes does; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(HANG_SECONDS)
        finally:
            self.process.kill()
