"""A worker: one process that answers HTTP and gRPC from its package."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE

from recsys.config.server import ServerSettings
from recsys.distributed.log import configure_logging
from recsys.serving.integrity import VerifiedFiles
from recsys.serving.server.engine import Engine
from recsys.serving.server.gate import Gate
from recsys.serving.server.grpc_service import grpc_server
from recsys.serving.server.http_app import http_app

logger = logging.getLogger(__name__)


def worker_app(settings: ServerSettings, verified: VerifiedFiles | None = None) -> Gate:
    """Load the package and return the application, which also answers gRPC while it runs.

    Args:
        settings: those of the server.
        verified: files that the process which began this one has compared with their hashes.

    Raises:
        ValueError: the package cannot be loaded by the only worker; one of several ends its
            process with the exit code by which the others are ended, too.
    """
    gc.disable()  # until it answers; the search for garbage takes a fifth of the start
    configure_logging(0, settings.log_level, settings.log_format)
    of_http = logging.getLogger("uvicorn")
    of_http.handlers, of_http.propagate = logging.getLogger("recsys").handlers, False
    try:
        engine = Engine(settings, verified)
    except ValueError as error:
        if settings.workers == 1:
            raise
        logger.error("%s", error)
        raise SystemExit(STARTUP_FAILURE) from error

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        """Answer gRPC and watch the package as long as HTTP is answered."""
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        server = grpc_server(engine, f"{host}:{settings.grpc_port}")
        await server.start()
        gc.freeze()  # a search for garbage among all modules would stop requests for 0.2 s
        gc.enable()
        engine.count_worker()
        watch = asyncio.create_task(engine.watch())
        logger.info("ready, version %s", engine.served.version)
        yield
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        await server.stop(settings.grace)

    return Gate(http_app(engine, lifespan), engine)
