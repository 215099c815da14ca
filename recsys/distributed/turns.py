"""Decide with which batches the ranks exchange flags: often enough by the clock, not each time.

All ranks decide alike, without a collective of their own: the pace of the slowest rank is among the
flags that they exchange.
"""

from __future__ import annotations

import time

# Seconds between two exchanges at the pace of the last one: about as long as a request to end, or
# an error of one rank, waits for the others. Schedulers kill 30 seconds after they ask.
SECONDS_BETWEEN = 0.5
MOST_BATCHES = 16
# Flags are exchanged with each of a stretch's first batches: a pipeline fetches several before its
# first step, so that their pace says nothing of the steps.
FIRST_BATCHES = 8


class Turns:
    """Counts batches and says with which of them the ranks exchange flags.

    Args:
        alone: there is one rank, whose flags cost nothing: they are read with every batch.

    Example::

        turns = Turns(alone=False)
        turns.begin()
        turns.take()  # True: the first batches exchange flags
        milliseconds = turns.pace()  # the ranks exchange the largest
        turns.set_pace(milliseconds)
    """

    def __init__(self, alone: bool) -> None:
        """Start with an exchange per batch."""
        self.number = 0  # of batches taken
        self._alone = alone
        self._left = 0  # batches until the next exchange
        self._every, self._first = 1, 0
        self._last_number, self._last_time = 0, time.monotonic()

    def begin(self) -> None:
        """Begin a stretch of batches."""
        self._left, self._every, self._first = 0, 1, self.number + FIRST_BATCHES

    def take(self) -> bool:
        """Count a batch; return whether flags are exchanged with it."""
        self.number += 1
        if self._left > 0:
            self._left -= 1
            return False
        self._left = self._every - 1
        return True

    def pace(self) -> int:
        """Return milliseconds per batch since the last result above 0; 0 if no batch was taken."""
        count = self.number - self._last_number
        if not count:
            return 0
        now = time.monotonic()
        milliseconds = round(1e3 * (now - self._last_time) / count)
        self._last_number, self._last_time = self.number, now
        return max(1, min(milliseconds, 2**30))

    def set_pace(self, milliseconds: int) -> None:
        """Set the largest pace of all ranks, which decides on the exchanges that follow."""
        if milliseconds and not self._alone and self.number > self._first:
            self._every = max(1, min(MOST_BATCHES, int(1e3 * SECONDS_BETWEEN) // milliseconds))
