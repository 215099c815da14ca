"""Callbacks: user code at the start, the steps, the validations and the end of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from recsys.config.named_parts import make_part

if TYPE_CHECKING:
    from recsys.build import Job
    from recsys.checkpoint.progress import Progress
    from recsys.distributed.lockstep import Lockstep


class Callback:
    """Base of user callbacks, called on every rank; subclasses take no constructor arguments.

    `job` has the model (`job.em3`), the settings (`job.config`) and the ranks (`job.ranks`);
    `progress` has the steps, epochs and best score so far. An error ends the job on all ranks.
    """

    def begin(self, job: Job, progress: Progress) -> None:
        """Before the first step of this job, which may resume a run."""

    def step(self, job: Job, progress: Progress, losses: dict[str, Tensor]) -> None:
        """After each step; `losses` [] by name are of this rank. Must not be a collective."""

    def validation(self, job: Job, progress: Progress, report: dict[str, Any]) -> None:
        """After each validation; `report` is equal on all ranks."""

    def end(self, job: Job, progress: Progress) -> None:
        """After the last step and its validation; not if the job was asked to end."""


class Callbacks:
    """The callbacks of a job, made from the setting `callbacks`. Building is a collective."""

    def __init__(self, job: Job) -> None:
        self.job, self.callbacks = job, list[Callback]()
        with job.ranks.raise_on_all_ranks():
            names = job.config.callbacks
            self.callbacks = [make_part("callbacks", name, {}, Callback) for name in names]

    def step(self, progress: Progress, losses: dict[str, Tensor], lockstep: Lockstep) -> None:
        """Call all callbacks; all ranks raise an error when they next exchange flags."""
        try:
            for callback in self.callbacks:
                callback.step(self.job, progress, losses)
        except Exception as error:  # a user's class may raise any error
            lockstep.record_error(error)

    def run(self, call: Callable[[Callback], None]) -> None:
        """Pass each callback to `call`; all ranks raise an error. A collective if there are any."""
        for callback in self.callbacks:
            with self.job.ranks.raise_on_all_ranks():
                call(callback)
