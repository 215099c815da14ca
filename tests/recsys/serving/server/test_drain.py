"""How a server ends: not ready first, then without new connections, then without open requests."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from tests.ranks import HANG_SECONDS
from tests.recsys.serving.server.served_package import TOKEN, ServedPackage

READY = ("/v2/health/ready", "/v2/models/shop/ready")
ANSWERED = ("/v2/health/live", "/v2", "/v2/models/shop", "/metrics")
DRAIN = 5  # seconds


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.long)])
def test_a_server_that_ends_is_not_ready_but_answers_until_its_drain_is_over(
    package_run: tuple[Path, Path, np.ndarray], tmp_path: Path, workers: str
) -> None:
    options = ("--drain", str(DRAIN), "--workers", workers)
    server = ServedPackage(package_run[1], tmp_path / "log", *options)
    server.wait_for(rf"(?s)(ready, version.*){{{workers}}}")
    body = (package_run[1] / "request.json").read_bytes()
    grpc = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
    with socket.create_connection(("127.0.0.1", server.port), HANG_SECONDS) as half_sent:
        try:
            assert [server.call(path).status for path in READY + ANSWERED] == [200] * 6
            assert grpc.is_server_ready()
            server.process.send_signal(signal.SIGTERM)
            server.wait_for(rf"(?s)(draining.*){{{workers}}}")
            ended = time.monotonic() + DRAIN

            assert [server.call(path).status for path in READY] == [503, 503]
            with pytest.raises(InferenceServerException, match="UNAVAILABLE"):
                grpc.is_server_ready()
            rank = f"POST /v1/rank HTTP/1.1\r\nauthorization: Bearer {TOKEN}\r\n"
            half_sent.sendall(f"{rank}content-length: {len(body)}\r\n\r\n".encode())
            while time.monotonic() < ended - 3:
                answers = [server.call("/v1/rank", json.loads(body)), *map(server.call, ANSWERED)]
                assert {answer.status for answer in answers} == {200}
                assert {answer.headers["connection"] for answer in answers} == {"close"}
                assert grpc.is_server_live()
            while server.is_listening():
                assert time.monotonic() < ended + HANG_SECONDS
                time.sleep(0.1)
            half_sent.sendall(body)

            assert b"HTTP/1.1 200" in half_sent.recv(2**16)
            assert server.process.wait(HANG_SECONDS) == 0
        finally:
            server.process.kill()


def test_a_second_signal_ends_the_drain(
    package_run: tuple[Path, Path, np.ndarray], tmp_path: Path
) -> None:
    server = ServedPackage(package_run[1], tmp_path / "log", "--drain", str(int(HANG_SECONDS)))
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("draining")

    assert server.end() == 0
