"""Metrics of the server in the format of Prometheus, summed over all workers, and the log line.

Set the folder `PROMETHEUS_MULTIPROC_DIR` before importing this module.
"""

import logging
import os
import re
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from uuid import uuid4

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

logger = logging.getLogger(__name__)

ID_HEADER = "x-request-id"
SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)

REQUESTS = Histogram(
    "recsys_request_seconds", "Seconds of a request", ["route", "status"], buckets=SECONDS
)
CANDIDATES = Histogram("recsys_request_candidates", "Candidates of a request", buckets=SIZES)
# By kind: unknown (ids), null (of files), out_of_range (numbers beyond those of training).
COLUMN_VALUES = Counter("recsys_column_values", "Values of requests, by column", ["column", "kind"])
COLUMN_DRIFT = Counter(
    "recsys_column_drift",
    "Values of requests that are unknown, null or out of range",
    ["column", "kind"],
)
TRAINING_SHARE = Gauge(
    "recsys_training_share",
    "Share of such values in the training rows",
    ["column", "kind"],
    multiprocess_mode="livemax",
)
WAITING = Gauge(
    "recsys_waiting_requests", "Requests that wait or are scored", multiprocess_mode="livesum"
)
WORKERS = Gauge(
    "recsys_package_workers",
    "Workers that serve a version of the package",
    ["version"],
    multiprocess_mode="livesum",
)
RELOAD_FAILURES = Counter("recsys_reload_failures", "New packages that could not be loaded")


def exposition() -> bytes:
    """Return the metrics of all workers, without gauges of workers that have ended."""
    for file in Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).glob("gauge_live*_*.db"):
        process = file.stem.rsplit("_", 1)[1]
        if not Path("/proc", process).exists():
            mark_process_dead(int(process))
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return generate_latest(registry)


def count_values(kind: str, counts: Mapping[str, tuple[int, int]]) -> None:
    """Count values, and those that drift, by column."""
    for column, (number, drifted) in counts.items():
        values, drift = _counters(column, kind)
        values.inc(number)
        if drifted:
            drift.inc(drifted)


@cache
def _counters(column: str, kind: str) -> tuple[Counter, Counter]:
    """Return the counters of a column, which have the value 0 from then on."""
    return COLUMN_VALUES.labels(column, kind), COLUMN_DRIFT.labels(column, kind)


def out_of_range(
    columns: Mapping[str, np.ndarray], statistics: Mapping[str, Mapping[str, float]]
) -> dict[str, tuple[int, int]]:
    """Count numbers, and those beyond the range of training, by column that has one."""
    counts = {}
    for name, values in columns.items():
        if "low" in (bounds := statistics.get(name, {})):
            beyond = (values < bounds["low"]) | (values > bounds["high"])
            counts[name] = len(values), int(beyond.sum())
    return counts


class RequestLog:
    """The log line and the seconds of one request, whose clock starts now."""

    def __init__(self, route: str, client_id: str) -> None:
        is_usable = re.fullmatch(r"[\w.:/+=-]{1,128}", client_id, re.ASCII)
        self.route, self.id = route, client_id if is_usable else uuid4().hex
        self._started = time.perf_counter()

    def end(self, status: str) -> None:
        seconds = time.perf_counter() - self._started
        REQUESTS.labels(self.route, status).observe(seconds)
        logger.info(
            f"{self.route} {status} {seconds * 1000:.2f} ms, request {self.id}",
            extra={"route": self.route, "status": status, "seconds": seconds, "request": self.id},
        )
