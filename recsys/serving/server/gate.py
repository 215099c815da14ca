"""The outermost layer of HTTP: request ids, bearer token, log line and metrics of each request."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from recsys.serving.server.engine import Engine
from recsys.serving.server.refusals import Unauthorized
from recsys.serving.server.request_log import ID_HEADER, RequestLog

logger = logging.getLogger(__name__)

OPEN = ("/v2/health/live", "/v2/health/ready")  # probes of Kubernetes send no token


class Gate:
    """Wraps the application."""

    def __init__(self, app: FastAPI, engine: Engine) -> None:
        """Keep the arguments."""
        self._app, self._engine = app, engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request of ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers, status = Headers(scope=scope), 500
        log = RequestLog("", headers.get(ID_HEADER, ""))
        scope.setdefault("state", {})["request_id"] = log.id

        async def send_with_id(message: Message) -> None:
            """Add the id to the headers and note the status."""
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers_sent = MutableHeaders(scope=message)
                headers_sent[ID_HEADER] = log.id
                if self._engine.is_draining:  # the next request finds another server
                    headers_sent["connection"] = "close"
            await send(message)

        try:
            if scope["path"] not in OPEN:
                self._engine.require_token(headers.get("authorization", ""))
            await self._app(scope, receive, send_with_id)
        except Unauthorized as error:
            asked = {"www-authenticate": "Bearer"}
            response = JSONResponse({"error": str(error)}, error.status, asked)
            await response(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed", log.id)
        route: Any = scope.get("route")
        is_known = route is not None and status != HTTPStatus.METHOD_NOT_ALLOWED
        log.route = f"{scope['method']} {route.path}" if is_known else "other"
        log.end(str(status))
