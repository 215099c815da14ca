"""A worker: one process that answers HTTP and gRPC from its package, until its clients have gone.

A load balancer takes seconds to notice that a server ends, and sends new connections meanwhile.
"""

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE
from uvicorn.server import HANDLED_SIGNALS, Server
from uvicorn.supervisors import Multiprocess

from recsys.config.server import ServerSettings
from recsys.distributed.log import configure_logging
from recsys.serving.server.connection import READ_TIMEOUT
from recsys.serving.server.grpc_service import grpc_server
from recsys.serving.server.http_app import RequestMiddleware, http_app
from recsys.serving.server.scoring_service import ScoringService
from recsys.storage.manifest import VerifiedFiles

logger = logging.getLogger(__name__)


def worker_app(
    settings: ServerSettings, http: socket.socket, verified: VerifiedFiles | None = None
) -> RequestMiddleware:
    """Load the package and return the application, which also answers gRPC while it runs.

    `http` is the bound socket; `verified` are files that the parent process has checked. If the
    package cannot be loaded, the only worker raises a ValueError; one of several exits.
    """
    gc.disable()  # until it answers; garbage collection takes a fifth of the start
    configure_logging(0, settings.log_level, settings.log_format)
    uvicorn_logger = logging.getLogger("uvicorn")
    uvicorn_logger.handlers = logging.getLogger("recsys").handlers
    uvicorn_logger.propagate = False
    drain = Drain()
    try:
        scoring = ScoringService(settings, verified)
    except ValueError as error:
        if settings.workers == 1:
            raise
        logger.error("%s", error)
        raise SystemExit(STARTUP_FAILURE) from error

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        http_address, grpc_address = f"{host}:{settings.port}", f"{host}:{settings.grpc_port}"
        server = grpc_server(scoring, grpc_address)
        await server.start()
        gc.freeze()  # a collection among all modules would stop requests for 0.2 s
        gc.enable()
        scoring.count_worker()
        watch = asyncio.create_task(scoring.watch())
        drain.start(scoring, server)
        http.listen()  # uvicorn accepts connections a moment later
        logger.info(
            f"ready, version {scoring.package.version}: {settings.package} as model "
            f"'{settings.name}', HTTP on {http_address}, gRPC on {grpc_address}"
        )
        yield {READ_TIMEOUT: settings.read_timeout}
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        await drain.finish()

    return RequestMiddleware(http_app(scoring, lifespan), scoring)


class Drain:
    """Handles the signals that end a worker, in place of uvicorn.

    SIGTERM ends it `drain` seconds later, a second signal or SIGINT at once. Running requests then
    have `grace` seconds.
    """

    def __init__(self) -> None:
        """Let signals end the process while it loads the package; called by the main thread."""
        self._stop: asyncio.Task[None] | None = None
        self._end_http = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(self, scoring: ScoringService, server: grpc.aio.Server) -> None:
        self._scoring, self._server = scoring, server
        loop = asyncio.get_running_loop()
        for number in HANDLED_SIGNALS:
            signal.signal(number, lambda number, _: loop.call_soon_threadsafe(self._begin, number))

    def _begin(self, number: int) -> None:
        seconds = self._scoring.settings.drain
        if number != signal.SIGTERM or self._scoring.is_draining:
            seconds = 0
        self._scoring.is_draining = True
        if seconds:
            logger.info("draining: not ready, but requests are answered for %s s", seconds)
        asyncio.get_running_loop().call_later(seconds, self._end, number)

    def _end(self, number: int) -> None:
        if self._stop is None:
            self._stop = asyncio.create_task(self._server.stop(self._scoring.settings.grace))
        uvicorn_server = getattr(self._end_http, "__self__", None)
        assert isinstance(uvicorn_server, Server)
        if number == signal.SIGTERM:
            # uvicorn's handler raises the signal again at the end, which would kill the worker and
            # leave temporary files of compiled graphs.
            uvicorn_server.should_exit = True
        else:
            uvicorn_server.handle_exit(number, None)

    async def finish(self) -> None:
        await (self._stop or self._server.stop(self._scoring.settings.grace))


class Workers(Multiprocess):
    """Several workers, whose supervisor closes its copies of their sockets."""

    def terminate_all(self) -> None:
        """End the workers; later connections are refused instead of waiting for nobody."""
        for shared in self.sockets:
            shared.close()
        super().terminate_all()

    def keep_subprocess_alive(self) -> None:
        """Replace workers that ended or do not answer; notice an ended one at once."""
        for process in self.processes:
            # An open copy here makes the supervisor wait HEALTH_SECONDS for a dead worker's answer.
            process.child_conn.close()
        super().keep_subprocess_alive()
