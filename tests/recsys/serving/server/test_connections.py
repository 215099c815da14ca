"""Clients that send half a request, no HTTP or too much, or read no answer; a server's end."""

import json
import re
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from tests.ranks import HANG_SECONDS
from tests.recsys.serving.server.served_package import TOKEN, ServedPackage

READ, IDLE = 2, 1  # seconds of the server's timeouts
SLACK = 10  # seconds by which a busy machine may be late
BEARER = f"authorization: Bearer {TOKEN}\r\n".encode()
HEAD = b"POST /v1/rank HTTP/1.1\r\n" + BEARER
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
INFER = b"POST /v2/models/shop/infer HTTP/1.1\r\n" + BEARER
GET = b"GET /v2 HTTP/1.1\r\n" + BEARER
CLOSE = b"connection: close\r\n\r\n"
MANY = 200


@pytest.fixture(scope="module")
def server(
    package_run: tuple[Path, Path, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedPackage]:
    log = tmp_path_factory.mktemp("server") / "log"
    times = ("--read_timeout", str(READ), "--idle_timeout", str(IDLE))
    server = ServedPackage(package_run[1], log, *times, "--drain", str(int(HANG_SECONDS)))
    yield server
    if server.process.poll() is None:  # the last test was left out
        end_at_once(server)
    assert "Traceback" not in log.read_text()


def end_at_once(server: ServedPackage) -> None:
    """A second signal ends the drain."""
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("draining")
    assert server.end() == 0


def rank(package_run: tuple[Path, Path, np.ndarray]) -> bytes:
    """A request that is answered by 200."""
    body = (package_run[1] / "request.json").read_bytes()
    return HEAD + b"content-length: %d\r\n\r\n" % len(body) + body


def nested(head: bytes, depth: int = 100_000) -> bytes:
    body = b'{"user": ' + b"[" * depth + b"]" * depth + b"}"
    return head + b"content-length: %d\r\n" % len(body) + CLOSE + body


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", received)]


def connections(server: ServedPackage) -> int:
    opened = psutil.Process(server.process.pid).net_connections("tcp")
    return sum(connection.status != psutil.CONN_LISTEN for connection in opened)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READ + IDLE + SLACK
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_requests_that_do_not_arrive_whole_are_answered_by_408(server: ServedPackage) -> None:
    chunks = [HEAD[:-5], HEAD + b"content-length: 100\r\n\r\n{", CHUNKED + b"5\r\nabcde\r\n"]
    started = time.monotonic()
    with ThreadPoolExecutor() as clients:
        responses = list(clients.map(server.send, chunks))

    assert READ <= time.monotonic() - started < READ + SLACK
    for received in responses:
        assert statuses(received)[-1] == 408
        assert json.loads(received.split(b"\r\n\r\n")[-1])["error"]


def test_a_request_that_drips_has_no_longer_time(server: ServedPackage) -> None:
    started = time.monotonic()
    with (
        socket.create_connection(("127.0.0.1", server.port), HANG_SECONDS) as connection,
        pytest.raises(ConnectionError),
    ):
        connection.sendall(HEAD)
        while time.monotonic() - started < READ + SLACK:
            connection.sendall(b"x-more: yes\r\n")
            time.sleep(0.05)


def test_half_sent_requests_leave_nothing_open(server: ServedPackage) -> None:
    kinds = [HEAD, HEAD + b"content-length: 100\r\n\r\n{", b"", CHUNKED + b"5\r\nabcde\r\n"]
    with ExitStack() as stack:
        for number in range(MANY):
            address = ("127.0.0.1", server.port if number % 5 else server.grpc_port)
            connection = stack.enter_context(socket.create_connection(address))
            connection.sendall(kinds[number % len(kinds)])
        wait_until(lambda: connections(server) > MANY // 4)

        wait_until(lambda: connections(server) == 0)

    assert server.call("/v2").status == 200


def test_a_client_that_reads_no_answer_is_disconnected(server: ServedPackage) -> None:
    request = b"GET /openapi.json HTTP/1.1\r\n" + BEARER + b"\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(0.5)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(90 * request)  # more than buffers of the system have room for
        wait_until(lambda: connections(server) > 0)

        wait_until(lambda: connections(server) == 0)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"\0\1garbage\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\0\1\0\1\xfc\3\3" + bytes(99), 400),  # TLS
        (HEAD + b"content-length: -1\r\n\r\n", 400),
        (HEAD + b"content-length: %d\r\n\r\n" % 2**80, 400),
        (HEAD + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (GET.replace(b"/v2", b"/v2/models/%ff%00") + CLOSE, 404),
        (GET + b"x-request-id: \xff\r\n" + CLOSE, 200),
        (GET + b"".join(b"x-%d: y\r\n" % number for number in range(10_000)) + CLOSE, 431),
        (GET + b"x: " + b"y" * 2**20 + b"\r\n\r\n", 431),
        (CHUNKED + b"5;" + b"a" * 500_000, 431),
        (nested(HEAD), 400),
        (nested(INFER), 400),
        (INFER + b"inference-header-content-length: \xb2\r\n" + CLOSE, 400),
        (INFER + b"inference-header-content-length: " + b"9" * 5000 + b"\r\n" + CLOSE, 400),
    ],
)
def test_what_is_no_request_is_refused_and_fails_nowhere(
    server: ServedPackage, sent: bytes, expected: int
) -> None:
    actual = statuses(server.send(sent))

    assert actual == [expected] or (expected == 431 and not actual)  # a reset overtakes the answer
    assert server.call("/v2").status == 200
    assert server.metric(r'recsys_request_seconds_count{.*status="2\d\d"}') > 0
    assert server.metric(r'recsys_request_seconds_count{.*status="5\d\d"}') == 0


def test_an_answer_goes_before_the_refusal_of_what_follows(
    server: ServedPackage, package_run: tuple[Path, Path, np.ndarray]
) -> None:
    assert statuses(server.send(rank(package_run) + b"\0garbage\r\n\r\n")) == [200]
    assert statuses(server.send(rank(package_run) + GET + CLOSE)) == [200, 200]
    assert statuses(server.send(rank(package_run) + HEAD)) == [200, 408]


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return struct.pack(">I", len(content))[1:] + struct.pack(">BBI", kind, flags, stream) + content


HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)
HEADERS = {
    ":method": "POST",
    ":scheme": "http",
    ":path": "/inference.GRPCInferenceService/ServerLive",
    ":authority": "a",
    "content-type": "application/grpc",
    "te": "trailers",
}
CALL = b"".join(
    b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in header)
    for header in HEADERS.items()
)


def test_calls_of_grpc_that_do_not_arrive_whole_are_ended(server: ServedPackage) -> None:
    responses = {
        b"": b"handshake timeout|idle",
        HTTP2 + frame(1, 4, 1, CALL)[:30]: b"idle",
        HTTP2 + frame(1, 4, 1, CALL): b"grpc-status\x014",  # DEADLINE_EXCEEDED
        HTTP2 + frame(1, 5, 1, CALL): b"grpc-status\x013",  # INVALID_ARGUMENT
    }
    started = time.monotonic()
    with ThreadPoolExecutor() as clients:
        received = list(clients.map(lambda sent: server.send(sent, server.grpc_port), responses))

    assert time.monotonic() - started < READ + 2 * IDLE + SLACK
    for response, expected in zip(received, responses.values(), strict=True):
        assert re.search(expected, response)


READY = ("/v2/health/ready", "/v2/models/shop/ready")
PATHS = ("/v2/health/live", "/v2", "/v2/models/shop", "/metrics")
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
            assert [server.call(path).status for path in READY + PATHS] == [200] * 6
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
                responses = [server.call("/v1/rank", json.loads(body)), *map(server.call, PATHS)]
                assert {response.status for response in responses} == {200}
                assert {response.headers["connection"] for response in responses} == {"close"}
                assert grpc.is_server_live()
            while server.is_listening():
                assert time.monotonic() < ended + HANG_SECONDS
                time.sleep(0.1)
            half_sent.sendall(body)

            assert b"HTTP/1.1 200" in half_sent.recv(2**16)
            assert server.process.wait(HANG_SECONDS) == 0
        finally:
            server.process.kill()


def test_a_second_signal_ends_the_drain(server: ServedPackage) -> None:
    started = time.monotonic()
    end_at_once(server)
    assert time.monotonic() - started < HANG_SECONDS / 2
