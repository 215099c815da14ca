"""Starts the workers of a server, which share ports and mapped files, and ends them."""

import os
import socket
import tempfile
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from recsys.config.server import ServerSettings
from recsys.extras import missing_extra

REQUIRED_PACKAGES = ("fastapi", "grpc_tools", "httptools", "prometheus_client", "uvicorn")
HEALTH_SECONDS = 60  # without an answer, after which a worker is replaced


def require_installation() -> None:
    """Require the packages of the server; a ValueError names the command that installs them."""
    missing = [name for name in REQUIRED_PACKAGES if find_spec(name) is None]
    if missing:
        raise missing_extra("serve", "recsys serve", f"{', '.join(missing)} is missing")


def serve(settings: ServerSettings) -> None:
    """Serve a package until SIGTERM or SIGINT; ValueError: no package, or a port is taken."""
    if settings.port == settings.grpc_port != 0:
        raise ValueError(f"port and grpc_port are both {settings.port}; set another one of them")
    with (
        tempfile.TemporaryDirectory(prefix="recsys-serve-") as folder,
        _bound("port", settings.host, settings.port) as http,
        _reserved("grpc_port", settings.host, settings.grpc_port) as grpc,
    ):
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # before prometheus_client is imported
        ports = http.getsockname()[1], grpc.getsockname()[1]
        _run(replace(settings, port=ports[0], grpc_port=ports[1]), http)


def _run(settings: ServerSettings, http: socket.socket) -> None:
    import uvicorn
    from uvicorn.config import STARTUP_FAILURE

    from recsys.serving.package import read_manifest
    from recsys.serving.server.connection import BoundedConnection
    from recsys.serving.server.worker import Workers, worker_app
    from recsys.storage.manifest import VerifiedFiles

    # Ends connections whose client does not read the answer; they inherit the option.
    timeout_ms = 1000 * settings.read_timeout
    http.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
    verified = VerifiedFiles()
    config = uvicorn.Config(
        partial(worker_app, settings, http, verified),
        factory=True,
        http=BoundedConnection,
        ws="none",
        workers=settings.workers,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.grace,
        timeout_keep_alive=settings.idle_timeout,
        timeout_worker_healthcheck=HEALTH_SECONDS,
    )
    if settings.workers == 1:
        uvicorn.Server(config).run([http])
        return
    read_manifest(Path(settings.package), settings.verify, verified)  # for all workers
    workers = Workers(config, [http])
    workers.run()
    if any(process.exitcode == STARTUP_FAILURE for process in workers.processes):
        raise ValueError("a worker did not start; its error is above")


def _bound(name: str, host: str, port: int, is_shared: bool = False) -> socket.socket:
    """Return a bound socket; an address that is taken or not this machine's is a ValueError."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise ValueError(f"--{name} {port} on --host {host}: {error}; give another") from error
    return bound


def _reserved(name: str, host: str, port: int) -> socket.socket:
    """Return a socket that reserves an address, on which the workers' sockets may listen."""
    # An exclusive socket first: a shared one could take the port of another server.
    with _bound(name, host, port) as exclusive:
        port = exclusive.getsockname()[1]
    return _bound(name, host, port, is_shared=True)
