"""Settings of `recsys serve`, which every worker process gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from recsys.config.run import LogFormat, LogLevel

LONGEST_SECONDS = 2_000_000  # gRPC and the operating system store milliseconds in 32 bits


@dataclass(frozen=True)
class FeatureSettings:
    """Source of the features that are looked up by ids."""

    name: str = "package"
    """package (its own files), redis, feast, or a class of your own as `package.module:Class`"""
    options: dict[str, Any] = field(default_factory=dict)
    """arguments of the class"""


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server: package, addresses, workers and limits."""

    package: str = ""
    name: str = ""
    """name of the model; default: that of the folder"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0: all of this machine"""
    port: int = 8080
    """port of HTTP; 0: a free one"""
    grpc_port: int = 8081
    """port of gRPC; 0: a free one"""
    workers: int = 1
    """processes that answer requests"""
    threads: int = 0
    """threads of each process; 0: all processes together use all cores"""
    features: FeatureSettings = field(default_factory=FeatureSettings)
    """source of the features that are looked up by ids"""
    encoders: bool = False
    """keep the encoders of the package, and take new items by POST /v1/items"""
    verify: bool = True
    """compare the hashes of the files first, or their sizes alone"""
    token: str | None = field(default=None, repr=False)
    """bearer token of requests; default: that of RECSYS_TOKEN"""
    read_timeout: int = 20
    """seconds in which a request must arrive; a slower one is answered by 408"""
    idle_timeout: int = 65
    """seconds that a connection may be idle: longer than load balancers keep theirs"""
    drain: int = 5
    """seconds from SIGTERM, in which the server is not ready but answers all requests; longer than
    load balancers take to notice"""
    grace: int = 30
    """seconds after `drain` in which open requests may finish"""
    max_body: int = 4 * 2**20
    """largest number of bytes of a request"""
    max_candidates: int = 10_000
    """largest number of candidates of a request"""
    max_batch: int = 100
    """largest number of requests of a batch"""
    max_items: int = 1_000
    """largest number of new items of a request"""
    max_history: int = 10_000
    """largest number of events of each history"""
    max_values: int = 1_000
    """largest number of values of any other list"""
    max_text: int = 1_024
    """largest number of characters of a string"""
    max_waiting: int = 64
    """requests that wait in a worker; one more is answered by 503 at once"""
    log_level: LogLevel = "auto"
    """lowest level to log"""
    log_format: LogFormat = "text"
    """text, or json: an object per line"""

    def __post_init__(self) -> None:
        seconds = {"read_timeout": 1, "idle_timeout": 1, "drain": 0, "grace": 0}
        lowest = {"port": 0, "grpc_port": 0, "workers": 1, "threads": 0} | seconds
        lowest |= dict.fromkeys((name for name in vars(self) if name.startswith("max_")), 1)
        for name, minimum in lowest.items():
            value, option = getattr(self, name), f"--{name.replace('_', '-')}"
            if name in seconds and value > LONGEST_SECONDS:
                raise ValueError(f"{option}: is {value}; give at most {LONGEST_SECONDS}")
            if value < minimum:
                raise ValueError(f"{option}: is {value}; give at least {minimum}")
        if self.token is not None and (not self.token.isascii() or not self.token.isprintable()):
            raise ValueError("--token: has characters that no header may have; use ASCII")
        if self.token == "":
            raise ValueError("--token: is empty; give a token, or leave the option out")
