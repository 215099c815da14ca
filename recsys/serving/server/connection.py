"""HTTP connections that end when a client does not send its request."""

import asyncio
from http import HTTPStatus

from starlette.responses import JSONResponse
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

READ_TIMEOUT = "read_timeout"  # key of the seconds in the state that the app's lifespan yields
MAX_HEAD = 2**16  # bytes of the URL and all headers of a request
MAX_PIPELINED = 100  # requests of a connection that wait for an earlier answer


class HeadError(Exception):
    """Ends the parsing of a connection's bytes; the connection is closed."""


class BoundedConnection(HttpToolsProtocol):
    """Limits each request of a uvicorn connection to `READ_TIMEOUT` seconds from its first byte."""

    _timer: asyncio.TimerHandle | None = None
    _head_size = 0  # bytes since the last end of a head, part of a body, or end of a request
    _in_head = False
    _is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers, which hold the connection's memory."""
        self._stop_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._timer is None:
            self._start_timer()
        self._head_size += len(data)
        super().data_received(data)
        if self._head_size > MAX_HEAD:
            self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._start_timer()

    def on_headers_complete(self) -> None:
        """Hand a request to the application, unless its head is too large or too many wait."""
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD:
            self._refuse_head()
            raise HeadError
        if len(self.pipeline) >= MAX_PIPELINED:
            raise HeadError
        super().on_headers_complete()
        self._in_head, self._head_size = False, 0

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._head_size = 0

    def on_message_complete(self) -> None:
        """End a request; if it has its answer already, the timer still ends the connection."""
        super().on_message_complete()
        self._head_size = 0
        if not self.cycle.response_complete:
            self._stop_timer()

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def timeout_keep_alive_handler(self) -> None:
        """End an idle connection, unless its next request has begun, which has its own timer."""
        if self._timer is None:
            super().timeout_keep_alive_handler()

    def _start_timer(self) -> None:
        self._stop_timer()
        seconds = self.app_state[READ_TIMEOUT]
        self._timer = self.loop.call_later(seconds, self._end_reading, seconds)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end_reading(self, seconds: int) -> None:
        if self._awaits_response():  # bytes after that request are not read meanwhile
            self._start_timer()
            return
        problem = f"the request was not complete after {seconds} s"
        self._refuse(HTTPStatus.REQUEST_TIMEOUT, problem)

    def _refuse_head(self) -> None:
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        self._refuse(status, f"URL and headers have more than {MAX_HEAD} bytes, the limit")

    def _refuse(self, status: HTTPStatus, problem: str) -> None:
        """Answer the request that is being read, unless it has an answer; end the connection."""
        self._is_refused = True
        if self._awaits_response():
            self.cycle.keep_alive = False
        elif not self.transport.is_closing():
            if self._in_head or (self.cycle is not None and not self.cycle.response_started):
                self.transport.write(self._response(status, problem))
            self.transport.close()

    def _awaits_response(self) -> bool:
        cycle = self.cycle
        return bool(self.pipeline) or not (
            cycle is None or cycle.response_complete or cycle.more_body
        )

    def _response(self, status: HTTPStatus, problem: str) -> bytes:
        response = JSONResponse({"error": problem}, headers={"connection": "close"})
        headers = [*self.server_state.default_headers, *response.raw_headers]
        lines = [b"%s: %s\r\n" % header for header in headers]
        return b"".join([STATUS_LINE[status], *lines, b"\r\n", response.body])
