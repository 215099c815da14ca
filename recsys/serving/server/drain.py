"""The end of a worker: it answers until its clients have gone, then it answers what it has begun.

A load balancer takes seconds to notice that a server ends. Until then it sends new connections,
which would be refused.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from types import FrameType

import grpc
from uvicorn.server import HANDLED_SIGNALS
from uvicorn.supervisors import Multiprocess

from recsys.serving.server.engine import Engine

logger = logging.getLogger(__name__)


class Drain:
    """Handles the signals that end a worker, in place of uvicorn.

    SIGTERM makes the worker not ready, and ends it `drain` seconds later; a second signal, or
    SIGINT, ends it at once. Then HTTP and gRPC finish their requests together, in `grace` seconds.
    """

    _engine: Engine
    _server: grpc.aio.Server
    _loop: asyncio.AbstractEventLoop

    def __init__(self) -> None:
        """Let signals end the process while it loads the package; called by the main thread."""
        self._stop: asyncio.Task[None] | None = None
        self._end_http = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(self, engine: Engine, server: grpc.aio.Server) -> None:
        """Let signals begin the end of HTTP and gRPC, inside the event loop."""
        self._engine, self._server = engine, server
        self._loop = asyncio.get_running_loop()
        for number in HANDLED_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._begin, number)

    def _begin(self, number: int) -> None:
        seconds = self._engine.settings.drain
        if number != signal.SIGTERM or self._engine.is_draining:
            seconds = 0
        self._engine.is_draining = True
        if seconds:
            logger.info("draining: not ready, but requests are answered for %s s", seconds)
        self._loop.call_later(seconds, self._end, number)

    def _end(self, number: int) -> None:
        if self._stop is None:
            self._stop = self._loop.create_task(self._server.stop(self._engine.settings.grace))
        assert callable(self._end_http)  # uvicorn's own handler
        self._end_http(number, None)

    async def finish(self) -> None:
        """Wait until gRPC has ended, after HTTP."""
        await (self._stop or self._server.stop(self._engine.settings.grace))


class Workers(Multiprocess):
    """Several workers, whose supervisor keeps no socket open behind them."""

    def terminate_all(self) -> None:
        """End the workers; connections after that are refused instead of waiting for nobody."""
        for shared in self.sockets:
            shared.close()
        super().terminate_all()
