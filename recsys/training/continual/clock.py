"""Measures where the time of a partition goes, for the log and `RUN/seconds.jsonl`."""

from __future__ import annotations

import json
import time
from pathlib import Path


class Clock:
    """Seconds of the phases of a partition.

    Example::

        clock = Clock()
        clock.start()
        clock.lap("build")
        str(clock)  # "0.0 s (build 0.0)"
    """

    def __init__(self) -> None:
        """Begin without phases."""
        self.start()

    def start(self) -> None:
        """Begin a partition."""
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End a phase: the time since the last call belongs to it."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

    def append(self, file: Path, partition: str, rows: int) -> None:
        """Add a line with the seconds of a partition to a file; one that was killed has none."""
        line = {"partition": partition, "rows": rows, **self.seconds, "total": self.total}
        with file.open("a") as opened:
            opened.write(json.dumps(line) + "\n")

    def __str__(self) -> str:
        """Return the seconds as text."""
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"{self.total:.1f} s ({phases})"
