"""Keeps the ranks of a loop in step: what one of them knows, all act on before the same batch.

Before each batch one small collective tells whether any rank met an error, was asked to end
(SIGTERM, as schedulers and torchrun send it before they kill) or is due for a checkpoint.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from recsys.batch import Batch
from recsys.config import CheckpointSettings
from recsys.ranks import Ranks
from recsys.watchdog import Watchdog


class TrainingStopped(Exception):
    """The job was asked to end; raised on every rank, its state saved."""


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

    def training_batches(
        self, source: Iterator[Batch], count: int, step: int, group: int = 1
    ) -> Iterator[Batch]:
        """At most `count` batches; fewer where a checkpoint is due or the job is to end.

        The pipeline then runs what it has fetched, and nothing is in flight when the state is
        saved. `step` is the number of steps before the first of them. Batches come in whole groups
        of `group` (the last of `count` may be smaller), as their gradients are no part of a state.
        """
        every = self.settings.every_steps
        for number in range(count):
            batch = self._agreed(source, due=bool(every and (step + number + 1) % every == 0))
            if batch is None or (self.stop and number % group == 0):
                return
            yield batch
            if self.save and (number + 1) % group == 0:
                return

    def batches(self, source: Iterator[Batch]) -> Iterator[Batch]:
        """All batches of a pass without training.

        Raises:
            TrainingStopped: the job is to end.
        """
        while (batch := self._agreed(source, due=False)) is not None:
            self.raise_if_stopped()
            yield batch

    def settle(self) -> None:
        """Raises on all ranks what any of them met since the last batch. A collective."""
        self._agree(None, due=False)

    def raise_if_stopped(self) -> None:
        """Ends a pass that may be begun anew.

        Raises:
            TrainingStopped: the job is to end.
        """
        if self.stop:
            raise TrainingStopped

    def _agreed(self, source: Iterator[Batch], due: bool) -> Batch | None:
        batch: Batch | None = None
        error: Exception | None = None
        try:
            batch = next(source, None)
        except Exception as raised:
            error = raised
        self._agree(error, due)
        return batch

    def _agree(self, error: Exception | None, due: bool) -> None:
        error = self.error or error
        seconds = self.settings.every_seconds
        if seconds is not None and self.ranks.is_first:
            due = due or time.monotonic() - self._saved_at >= seconds
        flags = torch.tensor([error is not None, self._terminated, due], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.ranks.group)
        failed, stop, save = flags.tolist()
        if failed:
            self.ranks.raise_first(error)
        self.stop, self.save = self.stop or bool(stop), self.save or bool(save)
