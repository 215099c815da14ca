"""Record of each request: its id, a line of the log, and its seconds in the metrics."""

from __future__ import annotations

import logging
import re
import time
from uuid import uuid4

from recsys.serving.server import metrics

logger = logging.getLogger(__name__)

ID_HEADER = "x-request-id"


def id_of(header: str) -> str:
    """Return the client's id of a request, or a new one if it gives none that may be logged."""
    return header if re.fullmatch(r"[\w.:/+=-]{1,128}", header, re.ASCII) else uuid4().hex


class RequestLog:
    """One request, from its arrival on.

    Args:
        route: its method and route.
        request_id: the client's id, or an empty text.
    """

    def __init__(self, route: str, request_id: str) -> None:
        """Start the clock."""
        self.route, self.id = route, id_of(request_id)
        self._started = time.perf_counter()

    def end(self, status: str) -> None:
        """Write the line and count the seconds."""
        seconds = time.perf_counter() - self._started
        metrics.REQUESTS.labels(self.route, status).observe(seconds)
        logger.info(
            "%s %s %.2f ms, request %s",
            *(self.route, status, seconds * 1000, self.id),
            extra={"route": self.route, "status": status, "seconds": seconds, "request": self.id},
        )
