"""Metrics of the server in the format of Prometheus, summed over all worker processes.

prometheus-client keeps them in files of the folder `PROMETHEUS_MULTIPROC_DIR`, which must be set
before this module is imported.
"""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)

REQUESTS = Histogram(
    "recsys_request_seconds", "Seconds of a request", ["route", "status"], buckets=SECONDS
)
CANDIDATES = Histogram("recsys_request_candidates", "Candidates of a request", buckets=SIZES)
UNKNOWN_IDS = Counter("recsys_unknown_ids", "Ids that the model does not know", ["column"])
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
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
