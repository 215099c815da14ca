"""Work done ahead of who needs it, by threads of this process, in order and within bounds.

Decoding and gathering happen in pyarrow and numpy, which let other threads run meanwhile, so
threads are enough: they share the rows of a window and hand a batch over without a copy, where
worker processes would each decode all rows and send every batch through shared memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Result(Protocol[T_co]):
    """What a job gives: a `concurrent.futures.Future`, or a `Later`."""

    def result(self) -> T_co:
        """Wait for it, or raises what the job has raised."""


class Later(Generic[T]):
    """A job that runs in the thread that asks for its result, once."""

    def __init__(self, job: Callable[[], T]) -> None:
        self._job: Callable[[], T] | None = job
        self._result: T

    def result(self) -> T:
        if self._job is not None:
            self._result = self._job()
            self._job = None
        return self._result


class Submit(Protocol):
    """Takes a job: `Later`, or the `submit` of a pool of threads."""

    def __call__(self, job: Callable[[], T], /) -> Result[T]: ...


@contextmanager
def threads(count: int, name: str) -> Generator[ThreadPoolExecutor]:
    """Open a pool of threads; at its end jobs not begun are dropped, others waited for."""
    pool = ThreadPoolExecutor(count, name, *_on_device())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _on_device() -> tuple[Callable[[int], None], tuple[int]] | tuple[()]:
    """Make new threads use this one's GPU, as else they would pin memory on the first one."""
    if not torch.cuda.is_initialized():
        return ()
    return torch.cuda.set_device, (torch.cuda.current_device(),)


def in_order(jobs: Iterable[Callable[[], T]], submit: Submit, ahead: int) -> Generator[T]:
    """Yield results of the jobs in order; `ahead` of them run beside the one asked for.

    An error in a job is raised in place of its result.
    """
    pending: deque[Result[T]] = deque()
    for job in jobs:
        pending.append(submit(job))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
