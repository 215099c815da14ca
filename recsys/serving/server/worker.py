"""A worker: one process that answers HTTP and gRPC from its package."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE

from recsys.config.server import ServerSettings
from recsys.distributed.log import configure_logging
from recsys.serving.server.connection import READ_TIMEOUT
from recsys.serving.server.drain import Drain
from recsys.serving.server.engine import Engine
from recsys.serving.server.gate import Gate
from recsys.serving.server.grpc_service import grpc_server
from recsys.serving.server.http_app import http_app
from recsys.storage.manifest import VerifiedFiles

logger = logging.getLogger(__name__)


def worker_app(
    settings: ServerSettings, http: socket.socket, verified: VerifiedFiles | None = None
) -> Gate:
    """Load the package and return the application, which also answers gRPC while it runs.

    Args:
        settings: those of the server.
        http: the bound socket on which uvicorn answers.
        verified: files that the process which began this one has compared with their hashes.

    Raises:
        ValueError: the package cannot be loaded by the only worker; one of several ends its
            process with the exit code by which the others are ended, too.
    """
    gc.disable()  # until it answers; the search for garbage takes a fifth of the start
    configure_logging(0, settings.log_level, settings.log_format)
    of_http = logging.getLogger("uvicorn")
    of_http.handlers, of_http.propagate = logging.getLogger("recsys").handlers, False
    drain = Drain()
    try:
        engine = Engine(settings, verified)
    except ValueError as error:
        if settings.workers == 1:
            raise
        logger.error("%s", error)
        raise SystemExit(STARTUP_FAILURE) from error

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        """Answer gRPC and watch the package as long as HTTP is answered."""
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        addresses = [f"{host}:{port}" for port in (settings.port, settings.grpc_port)]
        server = grpc_server(engine, addresses[1])
        await server.start()
        gc.freeze()  # a search for garbage among all modules would stop requests for 0.2 s
        gc.enable()
        engine.count_worker()
        watch = asyncio.create_task(engine.watch())
        drain.start(engine, server)
        http.listen()  # uvicorn accepts connections a moment later
        served = engine.served.version, settings.package, settings.name
        text = "ready, version %s: %s as model '%s', HTTP on %s, gRPC on %s"
        logger.info(text, *served, *addresses)
        yield {READ_TIMEOUT: settings.read_timeout}
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        await drain.finish()

    return Gate(http_app(engine, lifespan), engine)
