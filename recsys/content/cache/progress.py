"""Shows the progress of encoding: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time

from recsys.distributed.log import progress_bar

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class FillProgress:
    """Progress of one rank's share, extrapolated to all ranks that share the work.

    Args:
        name: the modality.
        total: number of items of all ranks that share the work.
        share: number of items of this rank.
        shown: whether this rank shows the progress.
    """

    def __init__(self, name: str, total: int, share: int, shown: bool) -> None:
        """Start the clock and, on a terminal, the bar."""
        self.name, self.total, self.share, self.shown = name, total, share, shown
        self.done = 0
        self._start = self._last_line = time.monotonic()
        self._bar = progress_bar(total, name, shown, unit=" items", unit_scale=True)

    def add(self, items: int) -> None:
        """Count `items` more items of this rank as done."""
        self.done += items
        self._bar.update(self._done_by_all() - self._bar.n)
        if not self._bar.disable or not self.shown:
            return
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            logger.info(self.line(self._last_line - self._start))

    def _done_by_all(self) -> int:
        # Ranks have equal shares and do not communicate while they encode.
        return round(self.total * self.done / max(self.share, 1))

    def line(self, seconds: float) -> str:
        """Return count, rate and time left, after `seconds` of work."""
        done = self._done_by_all()
        rate = done / max(seconds, 1e-9)
        left = round((self.total - done) / rate) if rate else 0
        return (
            f"encoding '{self.name}': {done:,} of {self.total:,} items, {rate:,.0f} items/s, "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )

    def close(self) -> None:
        """End the bar."""
        self._bar.close()
