"""What is refused before a server starts."""

from __future__ import annotations

import socket

import pytest

from recsys.cli import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "0"], "--workers: is 0"),
        (["--max_history", "0"], "--max-history: is 0"),
        (["--drain", "-1"], "--drain: is -1"),
        (["--idle_timeout", "3000000"], "--idle-timeout: is 3000000; give at most"),
        (["--token", ""], "--token"),
        (["--token", "naïve"], "--token"),
    ],
)
def test_a_setting_out_of_range_is_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "package", *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["port", "grpc_port"])
def test_a_port_that_is_taken_is_named(
    option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    words = ["serve", "package", "--host", "127.0.0.1", "--port", "0", "--grpc_port", "0"]
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])

        assert main([*words, f"--{option}", port]) == 1

    assert f"--{option} {port}" in capsys.readouterr().err
