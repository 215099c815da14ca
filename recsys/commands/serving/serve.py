"""Runs `recsys serve`."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from recsys.commands.options import add_log_options
from recsys.config.server import Limits, ServerSettings, default_threads
from recsys.doctor import require_working_installation

TOKEN = "RECSYS_TOKEN"


def add_arguments(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the package, the ports and the limits."""
    add = parser.add_argument
    add("package", type=Path, help="package that `recsys export` wrote, or a link to one")
    add("--name", type=str | None, help="name of the model; default: that of the folder")
    text = "address to listen on; 0.0.0.0: all of this machine"
    add("--host", type=str, default="127.0.0.1", help=text)
    add("--port", type=int, default=8080, help="port of HTTP; 0: a free one")
    add("--grpc_port", type=int, default=8081, help="port of gRPC; 0: a free one")
    add("--workers", type=int, default=1, help="processes that answer requests")
    add("--threads", type=int | None, help="threads of each; default: together all cores")
    text = "compare the hashes of the files first; later: of some blocks, the rest while serving"
    add("--verify", type=bool | Literal["later"], default=True, help=text)
    add("--token", type=str | None, help=f"bearer token of requests; default: that of {TOKEN}")
    text = "seconds in which a request must arrive; a slower one is answered by 408"
    add("--read_timeout", type=int, default=ServerSettings.read_timeout, help=text)
    text = "seconds that a connection may be idle; longer than load balancers keep theirs"
    add("--idle_timeout", type=int, default=ServerSettings.idle_timeout, help=text)
    text = "seconds from SIGTERM in which the server is not ready but answers all requests"
    add("--drain", type=int, default=ServerSettings.drain, help=text)
    text = "seconds that open requests have after that"
    add("--grace", type=int, default=ServerSettings.grace, help=text)
    limits = Limits()
    for of in fields(Limits):
        value = getattr(limits, of.name)
        add(f"--{of.name}", type=int, default=value, help=of.metadata["help"])
    add_log_options(parser)


def run(arguments: Namespace) -> None:
    """Serve until the process is asked to end."""
    gc.disable()  # while modules and package are loaded: searches for garbage take a fifth of that
    try:
        _serve(arguments)
    finally:
        gc.enable()


def _serve(arguments: Namespace) -> None:
    from recsys.serving.server.start import require_installation, serve

    require_installation()
    require_working_installation(imports_torchrec=False)
    package: Path = arguments.package
    limits = Limits(**{of.name: arguments[of.name] for of in fields(Limits)})
    settings = ServerSettings(
        package=str(package),
        name=arguments.name or package.absolute().name,
        host=arguments.host,
        port=arguments.port,
        grpc_port=arguments.grpc_port,
        workers=arguments.workers,
        threads=arguments.threads or default_threads(arguments.workers),
        limits=limits,
        verify=arguments.verify,
        token=arguments.token if arguments.token is not None else os.environ.get(TOKEN),
        read_timeout=arguments.read_timeout,
        idle_timeout=arguments.idle_timeout,
        drain=arguments.drain,
        grace=arguments.grace,
        log_level=arguments.log_level,
        log_format=arguments.log_format,
    )
    serve(settings)
