"""Settings of `recsys serve`, which every worker process gets."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from recsys.config.run import LogFormat, LogLevel

LONGEST_SECONDS = 2_000_000  # gRPC and the system count milliseconds in 32 bits


@dataclass(frozen=True)
class Limits:
    """Largest sizes of a request; a larger one is refused."""

    max_body: int = 4 * 2**20
    """bytes"""
    max_candidates: int = 10_000
    max_history: int = 10_000
    """events of each history"""
    max_values: int = 1_000
    """values of any other list"""
    max_text: int = 1_024
    """characters of a string"""
    max_waiting: int = 64
    """requests that wait in a worker; one more is answered by 503 at once"""


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server: package, addresses, workers and limits."""

    package: str
    name: str
    """name of the model in the protocol"""
    host: str
    port: int
    grpc_port: int
    workers: int
    threads: int
    limits: Limits
    verify: bool
    """compare the hash of every file of a package with its manifest before it is served"""
    token: str | None = field(default=None, repr=False)
    read_timeout: int = 20
    """seconds in which a request must arrive; longer than a slow client needs for `max_body`"""
    idle_timeout: int = 65
    """seconds that a connection may be idle: longer than load balancers keep theirs"""
    drain: int = 5
    """seconds from SIGTERM, in which the server is not ready but answers all requests; longer than
    load balancers take to notice"""
    grace: int = 30
    """seconds that open requests have after that"""
    log_level: LogLevel = "auto"
    log_format: LogFormat = "text"

    def __post_init__(self) -> None:
        seconds = {"read_timeout": 1, "idle_timeout": 1, "drain": 0, "grace": 0}
        lowest = {"port": 0, "grpc_port": 0, "workers": 1, "threads": 1} | seconds
        for name in seconds:
            if (value := getattr(self, name)) > LONGEST_SECONDS:
                raise ValueError(
                    f"--{name.replace('_', '-')}: is {value}; give at most {LONGEST_SECONDS}"
                )
        for name, least in lowest.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"--{name.replace('_', '-')}: is {value}; give at least {least}")
        for name, value in vars(self.limits).items():
            if value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: is {value}; give at least 1")
        if self.token is not None and (not self.token.isascii() or not self.token.isprintable()):
            raise ValueError("--token: has characters that no header may have; use ASCII")
        if self.token == "":
            raise ValueError("--token: is empty; give a token, or leave the option out")


def default_threads(workers: int) -> int:
    """Return the threads of a worker that together use every core."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, workers))
