"""Keeps the ranks of a loop in step: what one of them knows, all act on before the same batch.

Before each batch one small collective tells whether any rank met an error, was asked to end
(SIGTERM, as schedulers and torchrun send it before they kill) or is due for a checkpoint.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from recsys.config import CheckpointSettings
from recsys.distributed.ranks import Ranks
from recsys.distributed.watchdog import Watchdog

B = TypeVar("B")  # a batch; this room knows nothing of its content


class TrainingStopped(Exception):
    """The job was asked to end; raised on every rank, its state saved."""


@dataclass(frozen=True)
class _Asked(Generic[B]):
    """A batch, and what the ranks tell each other before it is used.

    error: of this rank; flags: of all ranks once `work` is done; num_saved: checkpoints before it.
    """

    batch: B | None
    error: Exception | None
    flags: Tensor
    work: Any
    num_saved: int


class Lockstep:
    """What the ranks agree on before each batch.

    Within `with Lockstep(...)`, SIGTERM does not kill this process but sets `stop` on all ranks.
    """

    def __init__(
        self, ranks: Ranks, settings: CheckpointSettings, watchdog: Watchdog | None = None
    ) -> None:
        self.ranks, self.settings = ranks, settings
        self.watchdog = watchdog or Watchdog(ranks, timeout=None)
        self.stop = False
        self.save = False
        self.error: Exception | None = None  # of this rank, told to all before the next batch
        self._terminated = False
        self._saved_at = time.monotonic()
        self._handler: Any = None
        self._ahead: _Asked[Any] | None = None  # taken from the source for the next step
        self._num_saved = 0

    def __enter__(self) -> Lockstep:
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True

    def saved(self) -> None:
        """A checkpoint was taken: the next is due anew."""
        self.save, self._saved_at = False, time.monotonic()
        self._num_saved += 1

    def training_batches(
        self, source: Iterator[B], count: int, step: int, group: int = 1
    ) -> Iterator[B]:
        """At most `count` batches; fewer where a checkpoint is due or the job is to end.

        The pipeline then runs what it has fetched, and nothing is in flight when the state is
        saved. `step` is the number of steps before the first of them. Batches come in whole groups
        of `group` (the last of `count` may be smaller), as their gradients are no part of a state.
        """
        every = self.settings.every_steps
        for number in range(count):
            asked = self._ahead or self._ask(source)
            # The ranks agree on a batch during the step before it, so that none waits here.
            self._ahead = self._ask(source) if number + 1 < count else None
            batch = self._answer(asked)
            self.save |= bool(every and (step + number + 1) % every == 0)
            if batch is None or (self.stop and number % group == 0):
                return
            yield batch
            if self.save and (number + 1) % group == 0:
                return

    def batches(self, source: Iterator[B]) -> Iterator[B]:
        """All batches of a pass without training.

        Raises:
            TrainingStopped: the job is to end.
        """
        while (batch := self._answer(self._ask(source))) is not None:
            self.raise_if_stopped()
            yield batch

    def settle(self) -> None:
        """Raises on all ranks what any of them met since the last batch. A collective."""
        self._answer(self._ask(iter(())))

    def raise_if_stopped(self) -> None:
        """Ends a pass that may be begun anew.

        Raises:
            TrainingStopped: the job is to end.
        """
        if self.stop:
            raise TrainingStopped

    def _ask(self, source: Iterator[B]) -> _Asked[B]:
        """Takes a batch and tells the other ranks how this one is."""
        batch: B | None = None
        error = self.error
        try:
            batch = next(source, None)
        except Exception as raised:
            error = error or raised
        seconds = self.settings.every_seconds
        is_due = (
            seconds is not None
            and self.ranks.is_first
            and time.monotonic() - self._saved_at >= seconds
        )
        flags = torch.tensor([error is not None, self._terminated, is_due], dtype=torch.int32)
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, self.ranks.group, async_op=True)
        return _Asked(batch, error, flags, work, self._num_saved)

    def _answer(self, asked: _Asked[B]) -> B | None:
        """The batch, once it is known how all ranks are."""
        asked.work.wait()
        failed, stop, save = asked.flags.tolist()
        if failed:
            self.ranks.raise_first(asked.error)
        self.stop = self.stop or bool(stop)
        # What was due when asked may have been saved since.
        self.save = self.save or bool(save and asked.num_saved == self._num_saved)
        return asked.batch
