"""Keep the ranks of a loop in step: all react to an event of any rank before the same batch.

Events are an error, SIGTERM, SIGINT and a checkpoint that is due. A rank that cannot read a batch
repeats its last batch until the next exchange of flags; the job then ends with that rank's error.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Generic, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from recsys.distributed.ranks import Ranks
from recsys.distributed.watchdog import Watchdog

B = TypeVar("B")  # a batch; this package does not use its content

# Seconds in which a second SIGINT is the launcher's copy of the first; later ones are the user's.
ECHO_SECONDS = 1.0
# Seconds between exchanges, the delay of an error. Schedulers kill 30 seconds after SIGTERM.
EXCHANGE_SECONDS = 0.5
MAX_BATCHES = 16
# First batches of a stretch, each with an exchange: a pipeline fetches them before its first step.
FIRST_BATCHES = 8


class TrainingStopped(Exception):
    """The job was asked to end; raised on every rank, its state saved."""


class FlagExchange:
    """Decides at which batches ranks exchange flags, from the slowest rank's pace."""

    def __init__(self) -> None:
        self.num_batches = 0
        self._next_exchange, self._interval, self._first_end = 0, 1, 0
        self._measured_batches, self._measured_at = 0, time.monotonic()

    def begin(self) -> None:
        self._next_exchange, self._interval = 0, 1
        self._first_end = self.num_batches + FIRST_BATCHES

    def is_due(self) -> bool:
        """Count a batch; return whether flags are exchanged with it."""
        self.num_batches += 1
        if self.num_batches < self._next_exchange:
            return False
        self._next_exchange = self.num_batches + self._interval
        return True

    def pace(self) -> int:
        """Return milliseconds per batch since the last result above 0; 0 without a new batch."""
        count = self.num_batches - self._measured_batches
        if not count:
            return 0
        seconds = time.monotonic()
        milliseconds = round(1e3 * (seconds - self._measured_at) / count)
        self._measured_batches, self._measured_at = self.num_batches, seconds
        return max(1, min(milliseconds, 2**30))

    def set_pace(self, milliseconds: int) -> None:
        """Set the largest pace of all ranks, which decides on the exchanges that follow."""
        if milliseconds and self.num_batches > self._first_end:
            self._interval = max(1, min(MAX_BATCHES, int(1e3 * EXCHANGE_SECONDS) // milliseconds))


@dataclass(frozen=True)
class _BatchRequest(Generic[B]):
    """A batch, and the flags that the ranks exchange before it is used."""

    batch: B | None
    error: Exception | None  # error of this rank
    # int32 [5], the maximum over ranks: error, no batch left, stop, checkpoint due, pace in ms.
    flags: Tensor | None = None  # None: they are exchanged with a later batch
    work: Any = None

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()


class Lockstep:
    """Agrees with the other ranks before each batch.

    SIGTERM and SIGINT set `stop` on all ranks; before the first batch they end this process.
    """

    def __init__(
        self,
        ranks: Ranks,
        checkpoint_seconds: float | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.ranks = ranks
        self.watchdog = watchdog or Watchdog(ranks, timeout=None)
        self.stop = False  # the job is asked to end; equal on all ranks
        self.save = False  # a checkpoint is due by time; equal on all ranks
        self._checkpoint_seconds = checkpoint_seconds
        self._error: Exception | None = None  # of this rank; raised on all before the next batch
        self._is_terminated = self._is_ending = self._has_begun = False
        self._interrupted_at: float | None = None  # the first Ctrl-C
        self._saved_at = time.monotonic()
        self._handlers: dict[int, Any] = {}
        self._prefetched: _BatchRequest[Any] | None = None  # batch fetched for the next step
        self._exchange = FlagExchange()
        self._failed_at = 0  # number of batches before `_error`
        self._has_failed = False  # whether this rank cannot read its next batches
        self._last_batch: Any = None  # repeated in their place

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._end)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """From now on record requests to end, also before the first batch, for `sync_errors`."""
        self._has_begun = True

    def _end(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: record the request to end, or before the first batch end at once."""
        seconds = time.monotonic()
        if self._interrupted_at is not None and seconds - self._interrupted_at >= ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self._has_begun:
            raise KeyboardInterrupt(number)
        self._is_terminated = True
        if number == signal.SIGINT and self._interrupted_at is None:
            self._interrupted_at = seconds
            if self.ranks.is_first:  # the interrupted code may hold the stream
                os.write(2, b"\nending after this step, with its state saved; again: at once\n")

    def record_error(self, error: Exception | None) -> None:
        """Keep an error of this rank, which all ranks raise when they next exchange flags."""
        if error is not None and self._error is None:
            self._error, self._failed_at = error, self._exchange.num_batches

    def saved(self) -> None:
        self.save, self._saved_at = False, time.monotonic()
        if self._prefetched is not None and self._prefetched.flags is not None:
            self._prefetched.wait()  # it may report the checkpoint just saved as due
            self._prefetched.flags[3] = 0

    def training_batches(self, source: Iterator[B], count: int, group: int = 1) -> Iterator[B]:
        """Yield the batches of a stretch of training, up to `end_stretch`. A collective.

        A stretch ends with a whole `group`; only the last of `count` may be smaller.
        """
        self._is_ending, self._has_begun = False, True
        self._exchange.begin()
        for number in range(count):
            if self._is_ending and number % group == 0:
                return
            request = self._prefetched or self._request(source, self._exchange.is_due())
            self._prefetched = None
            if number + 1 < count:
                self._prefetched = self._request(source, self._exchange.is_due(), request.error)
            batch = self._receive(request)
            if batch is None:
                return
            if self.ranks.world_size > 1:
                self._last_batch = batch
            yield batch

    def end_stretch(self) -> None:
        """End the stretch of training with the current group; call it on all ranks."""
        self._is_ending = True

    def batches(self, source: Iterator[B]) -> Iterator[B]:
        """Yield the batches of a pass without training, until a rank has none. A collective."""
        while (batch := self._receive(self._request(source))) is not None:
            self.raise_if_stopped()
            yield batch

    def sync_errors(self) -> None:
        """Raise on all ranks an error that any of them met since the last batch. A collective."""
        self._receive(self._request(iter(())))

    def raise_if_stopped(self) -> None:
        """Raise `TrainingStopped` if the job was asked to end; for work that can be repeated."""
        if self.stop:
            raise TrainingStopped("asked to end")

    def _request(
        self, source: Iterator[B], exchange: bool = True, pending: Exception | None = None
    ) -> _BatchRequest[B]:
        """Take a batch and, with `exchange`, begin to send this rank's flags. A collective."""
        batch: B | None = None
        error = self._error or pending
        try:
            batch = next(source, None)
        except Exception as raised:
            error, self._has_failed = error or raised, True
        if not exchange:
            return _BatchRequest(batch, error)
        seconds, interval = time.monotonic() - self._saved_at, self._checkpoint_seconds
        is_due = interval is not None and self.ranks.is_first and seconds >= interval
        is_single = self.ranks.world_size == 1  # so it waits for nobody before a batch
        pace = 0 if is_single else self._exchange.pace()
        states = [error is not None, batch is None, self._is_terminated, is_due, pace]
        flags, work = torch.tensor(states, dtype=torch.int32), None
        if not is_single:
            work = dist.all_reduce(flags, dist.ReduceOp.MAX, self.ranks.group, async_op=True)
        return _BatchRequest(batch, error, flags, work)

    def _receive(self, request: _BatchRequest[B]) -> B | None:
        """Return the batch, once the flags of all ranks are known. A collective."""
        if request.flags is None:
            self.record_error(request.error)
            return self._last_batch if self._has_failed and request.batch is None else request.batch
        request.wait()
        failed, ended, stop, save, pace = request.flags.tolist()
        if failed:
            self.record_error(request.error)
            self.ranks.raise_first(request.error, self._failed_at)
        self._exchange.set_pace(pace)
        self.stop |= bool(stop)
        self.save |= bool(save)
        return None if ended else request.batch
